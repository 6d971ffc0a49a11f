"""CPU threads beside a GPU."""

import pytest
import torch

from wmtp import cores
from wmtp.devices import few_cpu_threads


@pytest.fixture
def five_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("device", "chosen", "expected"), [("cuda", None, 2), ("cuda:3", None, 2), ("cuda", 5, 5), ("cpu", None, 5)]
)
def test_a_gpu_trains_beside_two_threads(five_threads, device, chosen, expected):
    with few_cpu_threads(torch.device(device), chosen):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 5


def test_one_thread_stays_one():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with few_cpu_threads(torch.device("cuda"), None):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("quota", "expected"), [("250000 100000", 3), ("10000 100000", 1), ("max 100000", 64), (None, 64)])
def test_a_container_may_have_a_share_of_the_cores(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores.usable_cores() == expected

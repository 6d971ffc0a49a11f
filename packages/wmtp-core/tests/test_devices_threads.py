"""CPU threads beside a GPU."""

import pytest
import torch

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

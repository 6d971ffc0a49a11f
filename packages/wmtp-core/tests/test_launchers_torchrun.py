"""Resources that the processes of a machine share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_recipe import tiny_recipe

import wmtp
from wmtp.actions.study_pool import worker_environments
from wmtp.cores import host_memory
from wmtp.launchers.local import Local
from wmtp.launchers.torchrun import share_cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say which cores a process may use")
@pytest.mark.parametrize(("cores", "processes", "threads"), [(16, 2, "8"), (10, 4, "2"), (2, 2, "1"), (2, 4, "1")])
def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, threads: str):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("wmtp.cores._QUOTA", Path("/nowhere"))
    monkeypatch.setenv("OMP_NUM_THREADS", "to be undone")
    monkeypatch.delenv("OMP_NUM_THREADS")
    share_cores(processes)
    assert os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("wmtp.devices.pick_device", lambda name: torch.device("cpu"))
    assert worker_environments(processes) == [{"OMP_NUM_THREADS": threads}] * processes


def test_what_the_user_says_of_threads_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    share_cores(1)
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("processes", [0, -1, 1025, 100_000])
def test_more_processes_than_a_machine_can_have_are_refused_by_the_config(processes: int):
    with pytest.raises(wmtp.ConfigError, match=f'launcher.processes: must be "auto" or 1 to 1024, not {processes}'):
        wmtp.check(tiny_recipe(launcher={"processes": processes}))


def test_more_processes_than_memory_holds_are_refused_before_one_starts(monkeypatch: pytest.MonkeyPatch):
    """On a CPU, which serves any number: each takes memory before it has a model."""
    config = wmtp.load_config(tiny_recipe(devices={"device": "cpu"}))
    monkeypatch.setattr("wmtp.cores.host_memory", lambda: 4 * 2**30)
    assert Local(10).count(config) == 10
    with pytest.raises(wmtp.ConfigError) as error:
        Local(11).count(config)
    assert str(error.value) == (
        "launcher.processes: 11 processes on a CPU take 4.61 GB before they have a model, and this machine has 4.29 GB; "
        "write at most 10"
    )


def test_the_memory_of_a_container_is_what_it_may_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("wmtp.cores._MEMORY", tmp_path / "memory.max")
    whole = host_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory() == whole
    (tmp_path / "memory.max").write_text("5000000\n")
    assert host_memory() == 5_000_000

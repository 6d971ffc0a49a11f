"""Resources that the processes of a machine share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from wmtp.actions.study_pool import worker_environments
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

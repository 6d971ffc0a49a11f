"""Joins the processes of a run, and leaves them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from typing import cast

import torch
import torch.distributed as dist
from attrs import evolve

from wmtp.config.schema import Config
from wmtp.config.sources import escape
from wmtp.config.tree import flat, to_mapping
from wmtp.devices import pick_device
from wmtp.distributed.environment import Worker, processes_by_machine
from wmtp.distributed.monitor import LostRankError, Monitor
from wmtp.distributed.ranks import Ranks
from wmtp.errors import ConfigError, WMTPError

__all__ = ["compare_processes", "joined"]

#: how long others may read data and load models
_PATIENCE = timedelta(hours=4)
Report = Callable[[str], None]
_COMPARED = ("wmtp-core", "torch", "transformers")


@contextmanager
def joined(config: Config, worker: Worker, *, report: Report | None = None) -> Iterator[Ranks]:
    """Join the other processes, which must have the same config.

    Args:
        config: complete and checked.
        worker: this process; one alone needs no others, and no variables.
        report: told that another rank is lost, just before this process is ended. Default: a log line.

    Raises:
        ConfigError: another rank has another config, or this machine has not the device.
        LostRankError: another rank is gone or hangs.
        WMTPError: the others are not there in time.
    """
    several = worker.world_size > 1
    device = pick_device(config.devices.device, worker.local_rank if several else None)
    if device.type == "mps":
        raise ConfigError('devices.device: "mps" computes in one process without [devices.fsdp]')
    timeout = timedelta(seconds=config.devices.timeout)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=None if several else dist.HashStore(),
            rank=worker.rank,
            world_size=worker.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" and device.index is not None else None,
        )
        # every process is a member, so each gets a group
        control = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=timeout))
        patient = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_PATIENCE))
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise WMTPError(f"rank {worker.rank} cannot join the other processes at {place}: {error}") from error
    monitor = None
    if several:
        monitor = Monitor(rank=worker.rank, world_size=worker.world_size, timeout=config.devices.timeout)
        monitor.report = report or monitor.report
    try:
        ranks = Ranks(
            rank=worker.rank,
            world_size=worker.world_size,
            local_rank=worker.local_rank,
            control=control,
            patient=patient,
            watch=monitor,
        )
        ranks = evolve(ranks, per_machine=compare_processes(config, ranks))
        yield ranks
        ranks.barrier()
    except Exception as error:
        if monitor is not None and _of_a_collective(error) and (explained := monitor.explain()) is not None:
            raise LostRankError(explained) from error
        if not several:
            dist.destroy_process_group()  # among several it could wait for one that waits for this one
        raise
    finally:
        if monitor is not None:
            monitor.stop()
    dist.destroy_process_group()


def _of_a_collective(error: BaseException | None) -> bool:
    """Return True for errors that may come from an unanswered collective."""
    while error is not None:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


def compare_processes(config: Config, ranks: Ranks) -> int | None:
    """Check that all ranks run the same versions and config; return `Ranks.per_machine`."""
    own = {name: metadata.version(name) for name in _COMPARED} | flat(to_mapping(config, text=escape))
    found = ranks.objects((socket.gethostname(), ranks.local_rank, own))
    main_host, _, main = found[0]
    problems = [
        f"rank {rank} ({host}) differs from rank 0 ({main_host}): {key}: {other.get(key)!r} in place of {main.get(key)!r}"
        for rank, (host, _, other) in enumerate(found)
        for key in dict.fromkeys((*main, *other))
        if other.get(key) != main.get(key)
    ]
    if problems:
        problems.append("start every process with the same files and the same --set")
    machines = processes_by_machine([local for _, local, _ in found])
    per_machine = machines[0] if len(set(machines)) == 1 else None
    if per_machine is None and config.devices.fsdp is not None and config.devices.fsdp.strategy == "hybrid":
        counted = ", ".join(map(str, machines))
        problems.append(
            "devices.fsdp.strategy: 'hybrid' shards a model within each machine, so all need as many processes, with "
            f'consecutive ranks; they have {counted}; start as many on each, or write "full"'
        )
    if problems:
        error = ConfigError(problems)
        error.said_by_main = not ranks.is_main  # type: ignore[attr-defined]
        raise error
    if ranks.world_size > 1:
        # several machines may call themselves the same, as containers do
        logging.getLogger("wmtp").info("%d processes on %d machines", ranks.world_size, len(machines))
    return per_machine

"""Cores and memory of this machine that processes may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from wmtp.errors import ConfigError
from wmtp.sizes import format_bytes

__all__ = ["check_memory_of_processes", "host_memory", "usable_cores"]

#: a container's share of the processors' time (cgroup v2): microseconds, or "max", of a period
_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
#: and its memory: bytes, or "max"
_MEMORY: Final = Path("/sys/fs/cgroup/memory.max")
#: bytes that a process takes for itself alone once it has imported torch and transformers
_EACH: Final = 400 * 2**20


def usable_cores() -> int:
    """Count the cores that this process may use.

    A container or taskset may give it fewer than the machine has, or only a share of their time.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = map(int, _QUOTA.read_text().split())
        cores = min(cores, max(1, math.ceil(quota / period)))
    return cores


def host_memory() -> int | None:
    """Return the bytes of memory of this machine, or of this container.

    None where they cannot be asked for.
    """
    known: list[int] = []
    with suppress(OSError, ValueError):
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):
        known.append(int(_MEMORY.read_text()))
    return min(known, default=None)


def check_memory_of_processes(what: str, count: int) -> None:
    """Refuse more processes than memory can hold, before one is started.

    Args:
        what: begins the message: the key or flag, and the number.
        count: of processes that each import torch.

    Raises:
        ConfigError: they would not fit even without a model.
    """
    if (memory := host_memory()) is not None and count > (most := max(1, memory // _EACH)):
        raise ConfigError(
            f"{what} take {format_bytes(count * _EACH)} before they have a model, and this machine has {format_bytes(memory)}; "
            f"write at most {most}"
        )

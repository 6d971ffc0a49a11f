"""Choice of device and precision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from wmtp.errors import ConfigError

__all__ = [
    "Precision",
    "apart_from_the_caller",
    "autocast_context",
    "count_devices",
    "device_name",
    "few_cpu_threads",
    "free_memory",
    "pick_device",
    "pick_precision",
    "prefer_fast_attention",
]

logger = logging.getLogger("wmtp")

#: files about the memory of a container
_CGROUP = Path("/sys/fs/cgroup")

Precision = Literal["fp32", "bf16", "bf16-params"]


def pick_device(name: Literal["auto", "cpu", "cuda", "mps"], local_rank: int | None = None) -> torch.device:
    """Return the configured device, or the best available one.

    Args:
        name: see ``devices.device``.
        local_rank: of several processes on this machine, each of which computes on a GPU of its own; None for one process.

    Raises:
        ConfigError: the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(candidate for candidate in ("cuda", "mps", "cpu") if available[candidate])
    elif not available[name]:
        there = ", ".join(candidate for candidate, is_there in available.items() if is_there)
        raise ConfigError(f'devices.device: this machine has no {name} that torch can use; there is {there}, or write "auto"')
    if local_rank is None or name == "cpu":
        return torch.device(name)
    count = count_devices(torch.device(name)) or 0
    if local_rank >= count:
        raise ConfigError(
            f"launcher.processes: process {local_rank} of this machine (from 0) has no {name} device of its own: there are "
            f"{count}; start at most one process a device"
        )
    device = torch.device(name, local_rank)
    if name == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Name a GPU as its maker does, other devices by kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def count_devices(device: torch.device) -> int | None:
    """Count the devices that processes can have for themselves.

    None: a CPU serves any number.
    """
    return None if device.type == "cpu" else torch.cuda.device_count() if device.type == "cuda" else 1


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that tensors on a device may still take.

    None where they cannot be asked for.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    known: list[int] = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError, ValueError):  # of a container; "max" where it has no limit
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        known.append(limit - used)
    return min(known, default=None)


def pick_precision(precision: Precision | Literal["fp8"], device: torch.device) -> Precision:
    """Return the precision of parameters and of what is not fp8.

    It is fp32, with a warning, where the device lacks bf16.
    """
    if precision == "fp8":
        precision = "bf16-params"
    able = device.type == "cpu" or (
        torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.amp.is_autocast_available(device.type)
    )
    if precision != "fp32" and not able:
        logger.warning("%s cannot compute in bf16; fp32 is used", device)
        return "fp32"
    return precision


def autocast_context(precision: Precision, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return a factory of the forward's autocast context; no autocast in ``fp32``."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def apart_from_the_caller() -> Iterator[None]:
    """Keep the caller's torch settings and a run's apart.

    A notebook may have `torch.inference_mode`, `torch.no_grad`, `torch.autocast` or another default device on: a run inside
    would fail late, or silently compute other numbers. And ``devices.threads``, or a plugin that changes threads, default dtype
    or default device, is not meant for what the caller does next.
    """
    threads, dtype, device = torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()
    kinds = ["cpu", *(kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available())]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in kinds:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if device.type != "cpu":  # such a context slows every operation down a little
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:  # else it stays unset: one that is set costs at every call
            torch.set_default_device(None if device.type == "cpu" else device)


@contextmanager
def prefer_fast_attention(device: torch.device) -> Iterator[None]:
    """Prefer cuDNN's attention on Hopper GPUs, inside, for attention without a mask.

    torch's own order has it after flash attention. Calls that cuDNN cannot compute take torch's order.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        yield
        return
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


_THREADS_BESIDE_A_GPU = 2


@contextmanager
def few_cpu_threads(device: torch.device, chosen: int | None) -> Iterator[None]:
    """Limit the threads of CPU operators while a GPU trains.

    They wait busily for the next operator, and those of a training loop are small: with one thread a core, on a machine with 64
    cores and an H200, a run had 41,160 tokens/s, with two threads 49,147. A model is read and tried out before, by all cores.

    Args:
        device: where the model trains.
        chosen: ``devices.threads``, which stays as it is.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" and chosen is None:
        torch.set_num_threads(min(before, _THREADS_BESIDE_A_GPU))
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Rules of ``devices.cuda_graphs``. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from wmtp.config.problems import Problem
from wmtp.config.schema import Config

__all__ = ["graph_problems"]


def graph_problems(config: Config) -> Iterator[Problem]:
    """Report settings that exclude recorded passes, each with what to write."""
    devices = config.devices
    if not devices.cuda_graphs:
        return
    path = ("devices", "cuda_graphs")
    if devices.device in ("cpu", "mps"):
        yield Problem(path, f'only NVIDIA GPUs have them, and devices.device = "{devices.device}"; remove this key')
    if config.models["base"].lora is None:
        yield Problem(path, "records passes of a model with adapters; add the table [models.base.lora], or remove this key")
    if not devices.compile:
        yield Problem(path, "records compiled layers; write devices.compile = true, or remove this key")
    if not devices.keeps_bf16:
        yield Problem(
            path,
            f'records a model in bf16, and devices.precision = "{devices.precision}"; write "bf16-params" or "fp8", or '
            "remove this key",
        )
    if devices.activation_checkpointing == "offload":
        yield Problem(
            path,
            'a recording holds nothing in the host\'s memory, where activation_checkpointing = "offload" has activations; '
            'write "full", or remove this key',
        )
    processes = config.launcher.processes
    if devices.fsdp is not None or (isinstance(processes, int) and processes > 1):
        what = "devices.fsdp" if devices.fsdp is not None else f"launcher.processes = {processes}"
        yield Problem(path, f"records the passes of one process, and {what} is for several; remove either")

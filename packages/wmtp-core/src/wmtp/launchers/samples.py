"""Samples of machine load, written into the run's log."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["latest_sample", "sample", "sample_line"]

_MARK: Final = "wmtp-sample "
_QUERY: Final = {
    "utilization.gpu": "utilization (%)",
    "memory.used": "memory used (MiB)",
    "memory.total": "memory (MiB)",
    "power.draw": "power (W)",
}
_TIMEOUT: Final = 10.0  # seconds


def sample(folder: Path) -> dict[str, float]:
    """Measure this machine now: GPUs, main memory, load and disk.

    GPUs as ``nvidia-smi`` says; the disk is that of ``folder``.
    """
    values = _gpus()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        memory = {name: float(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest}
        values["memory used (GiB)"] = (memory["MemTotal"] - memory["MemAvailable"]) / 2**20
        values["memory (GiB)"] = memory["MemTotal"] / 2**20
    except (OSError, KeyError, ValueError, IndexError):  # no Linux
        pass
    if hasattr(os, "getloadavg"):
        values["load"] = os.getloadavg()[0]
    values["disk free (GiB)"] = shutil.disk_usage(folder).free / 2**30
    return {name: round(value, 2) for name, value in values.items()}


def _gpus() -> dict[str, float]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu=index,{','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values: dict[str, float] = {}
    for line in done.stdout.splitlines():
        index, *numbers = (word.strip() for word in line.split(","))
        for name, number in zip(_QUERY.values(), numbers, strict=False):
            try:
                values[f"gpu/{index}/{name}"] = float(number)
            except ValueError:  # "[N/A]"
                continue
    return values


def sample_line(values: dict[str, float]) -> str:
    """Write a sample as a line of the log."""
    return _MARK + json.dumps(values)


def latest_sample(lines: Iterable[str]) -> dict[str, float]:
    """Return the last sample in a log; empty where there is none."""
    latest: dict[str, float] = {}
    for line in lines:
        _, mark, text = line.partition(_MARK)
        if not mark:
            continue
        try:
            values = json.loads(text)
            latest = {str(name): float(value) for name, value in values.items() if math.isfinite(value)}
        except (ValueError, AttributeError, TypeError):  # cut off, or somebody else's line
            continue
    return latest

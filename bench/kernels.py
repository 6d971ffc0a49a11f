"""Time of a step's kernels, by what they are for (``bench/fp8.py --kernels``)."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Kernels", "by_group"]

#: the first that a kernel's name fits; of several products of bf16, those of layers and loss may have one name
_GROUPS: dict[str, str] = {
    "products in fp8": r"nvjet_\w*_qq|nvjet_\w*_qr|e4m3|e5m2",
    "products in bf16": r"nvjet|gemm",
    "attention": r"cudnn|fmha|flash",
    "rounding": r"^_round_kernel|^_transpose_kernel",
    "optimizer": r"adam",
    "gated product": r"^triton_.*silu",
    "compiled, all else": r"^triton_",
}


class Kernels:
    """Profiler of steps ``first`` to ``first + count - 1``.

    Args:
        first, count: of the steps.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count
        self.milliseconds: dict[str, float] = {}
        self._profile: Any = None

    def end_of(self, step: int) -> None:
        """Start or stop, when the numbers of a step have come."""
        if step not in (self.first - 1, self.first + self.count - 1):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._profile is None:
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()
            return
        self._profile.__exit__(None, None, None)
        self.milliseconds = {e.key: e.self_device_time_total / 1e3 / self.count for e in self._profile.key_averages()}


def by_group(milliseconds: dict[str, float]) -> dict[str, float]:
    """Add up kernels by group, longest first."""
    sums: dict[str, float] = defaultdict(float)
    for name, value in milliseconds.items():
        sums[next((group for group, names in _GROUPS.items() if re.search(names, name)), "all else")] += value
    return dict(sorted(sums.items(), key=lambda item: -item[1]))

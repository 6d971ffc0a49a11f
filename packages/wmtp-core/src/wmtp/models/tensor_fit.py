"""Comparison of tensors with those wanted, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

__all__ = ["misfits"]


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def misfits(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, _Shaped]) -> list[str]:
    """List missing, unexpected and misshapen tensors, a phrase for each."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {list(tensor.shape)} in place of {list(wanted[name])}"
        for name, tensor in found.items()
        if name in wanted and tuple(tensor.shape) != wanted[name]
    ]
    return problems

"""Short trials of what an architecture does only with many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["chooses_tokens", "small_windows"]

#: how far a layer looks back, or how many tokens it chooses, by the names that architectures give it
_NAMES = ("sliding_window", "attention_chunk_size", "index_topk", "keep_window_size", "window_size", "attention_window_size")
_SMALL = 3


def chooses_tokens(model: nn.Module) -> bool:
    """Tell whether layers attend to chosen tokens, as sparse attention does."""
    return any(isinstance(fields.get("index_topk"), int) for module in model.modules() for fields in _fields(module))


@contextmanager
def small_windows(model: nn.Module) -> Iterator[None]:
    """Shrink windows, chunks and sparse choices to 3 tokens, inside.

    For short trials.
    """
    changed: list[tuple[dict[str, Any], str, int]] = []
    holders = {id(fields): fields for module in model.modules() for fields in _fields(module)}
    for fields in holders.values():
        for name in _NAMES:
            value = fields.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > _SMALL:
                changed.append((fields, name, value))
                fields[name] = _SMALL
    try:
        yield
    finally:
        for fields, name, value in changed:
            fields[name] = value


def _fields(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield a module's attributes, and those of its config.

    The module reads its config later.
    """
    yield vars(module)
    if (config := getattr(module, "config", None)) is not None:
        yield vars(config)

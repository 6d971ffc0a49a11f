"""Contract between compiled layers and a cache for decoding.

The cache's tensors keep their places and shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

from torch import Tensor, nn

from wmtp.models.anatomy import LayerCall

__all__ = [
    "LayerPart",
    "LayeredCache",
    "compiled_steps",
    "layer_number",
    "layers_are_plain",
    "plain_layers",
    "steps_are_compiled",
    "swap_caches",
]


class LayerPart:
    """Part of a cache that is one layer's.

    It has ``update`` too.

    Args:
        keys, values: ``[B, heads, capacity, d]``.
        slots: ``[B, T]``, where the next ones are written.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        self.keys, self.values, self.slots = keys, values, slots


class LayeredCache(ABC):
    """A cache that can hand out the part of one layer."""

    @abstractmethod
    def of_layer(self, number: int) -> LayerPart:
        """Return the part of one layer, with no other layer's tensors.

        Compiled code is chosen by what it reads. It reads the whole cache by
        the layer's number, so each layer would need code of its own; this part is of the same kind for all.
        """


class _Asked(local):
    """Wishes of one thread: another may decode with another model.

    Set in ``__init__``: torch.compile guards a thread's own attributes, not those of the class. Of a `ContextVar` torch before
    2.13 makes a graph break.
    """

    def __init__(self) -> None:
        self.compiled = self.plain = False


_asked = _Asked()


@contextmanager
def compiled_steps() -> Iterator[None]:
    """Run compiled layers compiled with a `LayeredCache` too, inside.

    Every call has the shapes of one before.
    """
    before, _asked.compiled = _asked.compiled, True
    try:
        yield
    finally:
        _asked.compiled = before


@contextmanager
def plain_layers() -> Iterator[None]:
    """Inside, compiled layers run uncompiled: calls whose shapes hardly come again."""
    before, _asked.plain = _asked.plain, True
    try:
        yield
    finally:
        _asked.plain = before


def steps_are_compiled() -> bool:
    """Tell whether this is inside of `compiled_steps`, and not of `plain_layers`."""
    return _asked.compiled and not _asked.plain


def layers_are_plain() -> bool:
    """Tell whether this is inside of `plain_layers`."""
    return _asked.plain


def layer_number(layer: nn.Module) -> int | None:
    """Return the number by which a layer finds its cache.

    None where its modules have several or none.
    """
    numbers = {vars(module)["layer_idx"] for module in layer.modules() if "layer_idx" in vars(module)}
    return numbers.pop() if len(numbers) == 1 else None


def swap_caches(value: Any, number: int) -> Any:
    """Replace a `LayeredCache` in arguments by one layer's part of it."""
    if isinstance(value, LayeredCache):
        return value.of_layer(number)
    if isinstance(value, LayerCall):
        return value.map(lambda item: swap_caches(item, number))
    return value

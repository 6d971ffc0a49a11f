"""A key-value cache whose rows have lengths of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from wmtp.devices import free_memory
from wmtp.errors import ConfigError
from wmtp.generation.states import PartCall, PartStates
from wmtp.models.documents import StateKeeper
from wmtp.models.step_cache import LayeredCache, LayerPart
from wmtp.sizes import format_bytes

__all__ = ["RowCache", "check_memory"]


def check_memory(what: str, needed: int, rows: int, capacity: int, device: torch.device) -> None:
    """Check that something fits into free memory, before it is made.

    Raises:
        ConfigError: it is larger.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise ConfigError(
            f"the {what} of {rows} rows of up to {capacity:,} tokens takes {format_bytes(needed)}, and {device} has "
            f"{format_bytes(free)} free: decode fewer rows at once (batch_size, or samples of a prompt), or write fewer tokens "
            "(max_new_tokens)"
        )


class RowCache(Cache, StateKeeper, LayeredCache):
    """Keys and values of one or more layers.

    The token at position p of a row is always in slot p. So nothing has to be moved or masked out when a row's draft is
    rejected: its slots are written again by what comes next, and until then no query looks at them, because a query at position
    p sees slots 0..p only.

    Parts of layers that keep a state instead have it kept as it was after each of the last tokens (`PartStates`).

    Args:
        capacity: slots of a row.
        config: of the model.
        history: how many tokens of a prompt may be read again.
        layers: how many will keep keys and values here.
    """

    def __init__(self, capacity: int, config: PreTrainedConfig, history: int = 1, layers: int = 1) -> None:
        super().__init__(layers=[])
        self._layers = layers
        self._capacity, self._config, self._history = capacity, config, history
        self._states: dict[nn.Module, PartStates] = {}
        self._lengths: Sequence[int] | None = None
        self._store: dict[int, tuple[Tensor, Tensor]] = {}
        self._slots = torch.zeros(0)
        self._start: int | None = None
        self._width = 0
        self._ranges: dict[int, Tensor] = {}  # of numbers of rows and of heads
        self._places: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # of what is written next, by number of heads

    @property
    def holds_only_slots(self) -> bool:
        """Tell whether only keys and values are kept.

        They are written in place.
        """
        return not self._states

    def place(self, slots: Tensor, start: int | None, width: int, lengths: Sequence[int] | None = None) -> None:
        """Say where the next `update` of every layer writes.

        Args:
            slots: ``[B, T]`` int64, consecutive in each row.
            start: the first slot where it is the same in all rows; else None.
            width: how many slots attention looks at: more than any of ``slots``.
            lengths: number of tokens of each new row; the rest is padding. None: rows continue.
        """
        self._slots, self._start, self._width, self._lengths = slots, start, width, lengths
        self._places = {}

    def place_as(self, other: RowCache) -> None:
        """Write where ``other`` wrote last."""
        self.place(other._slots, other._start, other._width, other._lengths)
        self._places = other._places

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, heads, T, d]`` of one layer.

        The result is as transformers' contract says: what attention looks at.
        """
        if layer_idx not in self._store:
            if not self._store:
                self._check_memory(key_states, value_states)
            rows, heads = key_states.shape[:2]
            self._store[layer_idx] = (
                key_states.new_zeros(rows, heads, self._capacity, key_states.shape[-1]),
                value_states.new_zeros(rows, heads, self._capacity, value_states.shape[-1]),
            )
        if self._start is None:
            return self.of_layer(layer_idx).update(key_states, value_states)
        stored = self._store[layer_idx]
        tokens = key_states.shape[2]
        for kept, new in zip(stored, (key_states, value_states), strict=True):
            kept[:, :, self._start : self._start + tokens] = new
        return stored[0][:, :, : self._width], stored[1][:, :, : self._width]

    def _check_memory(self, keys: Tensor, values: Tensor) -> None:
        """Check the memory for all layers by the first one."""
        rows, heads = keys.shape[:2]
        needed = self._layers * rows * heads * self._capacity * (keys.shape[-1] + values.shape[-1]) * keys.element_size()
        check_memory("cache", needed, rows, self._capacity, keys.device)

    def of_layer(self, number: int) -> LayerSlots:
        """Return one layer's keys and values, and where to write next."""
        keys, values = self._store[number]
        heads = keys.shape[1]
        if heads not in self._places:  # the same in all layers with so many heads
            row, head = (self._range(count, keys.device) for count in keys.shape[:2])
            self._places[heads] = row[:, None, None], head[None, :, None], self._slots[:, None, :]
        return LayerSlots(self, keys, values, self._slots, self._places[heads], self._width)

    def _range(self, count: int, device: torch.device) -> Tensor:
        """Return 0, 1 … ``count`` − 1.

        Made once, since making it takes as long as writing a token.
        """
        if count not in self._ranges:
            self._ranges[count] = torch.arange(count, device=device)
        return self._ranges[count]

    def run_part(self, module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `StateKeeper.run_part`."""
        if module not in self._states:
            layer: int = module.layer_idx  # type: ignore[assignment]
            self._states[module] = PartStates(self._config, layer, self._history)
        rows, tokens = self._slots.shape
        call = PartCall(plain, args, kwargs, self, (rows, tokens))
        return self._states[module].read(call, self._slots, self._lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the slots before the tokens that are being read.

        Only models that are given no positions ask.
        """
        return self._width - self._slots.shape[-1]

    def with_rows(self, rows: Tensor) -> RowCache:
        """Copy some rows into a cache of their own."""
        copied = copy(self)
        copied._places = {}
        copied._store = {index: (keys[rows], values[rows]) for index, (keys, values) in self._store.items()}
        copied._states = {module: states.with_rows(rows) for module, states in self._states.items()}
        return copied

    def clear(self) -> None:
        """Forget all tokens; keys and values stay where they are."""
        if self._store:
            torch._foreach_zero_([tensor for pair in self._store.values() for tensor in pair])  # one launch for many
        self._states.clear()


class LayerSlots(LayerPart):
    """Keys and values of one layer, written at each row's position.

    Args:
        cache: that it is a part of; it answers whatever else is asked.
        keys, values, slots: see `LayerPart`.
        places: row, head and slot of each new key.
        width: slots that attention looks at.
    """

    def __init__(
        self,
        cache: RowCache,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        places: tuple[Tensor, Tensor, Tensor],
        width: int,
    ) -> None:
        super().__init__(keys, values, slots)
        self._cache, self._places, self._width = cache, places, width

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write ``[B, heads, T, d]``, and return what attention looks at."""
        self.keys[self._places] = key_states
        self.values[self._places] = value_states
        return self.keys[:, :, : self._width], self.values[:, :, : self._width]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

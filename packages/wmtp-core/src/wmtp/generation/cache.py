"""A key-value cache whose rows have lengths of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from wmtp.generation.states import PartCall, PartStates
from wmtp.models.documents import StateKeeper

__all__ = ["RowCache"]


class RowCache(Cache, StateKeeper):
    """Keys and values of one or more layers: the token at position p of a row is always in slot p.

    So nothing has to be moved or masked out when a row's draft is rejected: its slots are written again by what comes next,
    and until then no query looks at them, because a query at position p sees slots 0..p only.

    Parts of layers that keep a state instead have it kept as it was after each of the last tokens (`PartStates`).

    Args:
        capacity: slots of a row.
        config: of the model.
        history: how many tokens of a prompt may be read again.
    """

    def __init__(self, capacity: int, config: PreTrainedConfig, history: int = 1) -> None:
        super().__init__(layers=[])
        self._capacity, self._config, self._history = capacity, config, history
        self._states: dict[nn.Module, PartStates] = {}
        self._lengths: Sequence[int] | None = None
        self._store: dict[int, tuple[Tensor, Tensor]] = {}
        self._slots = torch.zeros(0)
        self._start: int | None = None
        self._width = 0

    @property
    def holds_only_slots(self) -> bool:
        """Tell whether nothing but keys and values is kept, which are written in place."""
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

    def place_as(self, other: RowCache) -> None:
        """Write where ``other`` wrote last."""
        self.place(other._slots, other._start, other._width, other._lengths)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, heads, T, d]`` of one layer; what it returns is transformers' contract."""
        if layer_idx not in self._store:
            rows, heads = key_states.shape[:2]
            self._store[layer_idx] = (
                key_states.new_zeros(rows, heads, self._capacity, key_states.shape[-1]),
                value_states.new_zeros(rows, heads, self._capacity, value_states.shape[-1]),
            )
        stored = self._store[layer_idx]
        tokens = key_states.shape[2]
        for kept, new in zip(stored, (key_states, value_states), strict=True):
            if self._start is not None:
                kept[:, :, self._start : self._start + tokens] = new
            else:
                row = torch.arange(len(new), device=new.device)[:, None]
                kept[row, :, self._slots] = new.transpose(1, 2)
        return stored[0][:, :, : self._width], stored[1][:, :, : self._width]

    def run_part(self, module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `StateKeeper.run_part`."""
        if module not in self._states:
            layer: int = module.layer_idx  # type: ignore[assignment]
            self._states[module] = PartStates(self._config, layer, self._history)
        rows, tokens = self._slots.shape
        call = PartCall(plain, args, kwargs, self, (rows, tokens))
        return self._states[module].read(call, self._slots, self._lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots before the tokens that are being read; only models that are given no positions ask."""
        return self._width - self._slots.shape[-1]

    def with_rows(self, rows: Tensor) -> RowCache:
        """Copy some rows into a cache of their own."""
        copied = copy(self)
        copied._store = {index: (keys[rows], values[rows]) for index, (keys, values) in self._store.items()}
        copied._states = {module: states.with_rows(rows) for module, states in self._states.items()}
        return copied

    def clear(self) -> None:
        """Forget all tokens; keys and values stay where they are."""
        for keys, values in self._store.values():
            keys.zero_()
            values.zero_()
        self._states.clear()

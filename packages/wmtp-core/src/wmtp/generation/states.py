"""Recurrent layer states per token, so rejected drafts leave no trace.

Such a part of a layer reads a prompt at once, and what follows token by token; its state is kept as it was after each of the
last tokens. What is read next begins in each row at the state after the last token that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import DynamicCache, PreTrainedConfig

__all__ = ["PartCall", "PartStates"]

#: the state of all rows after some token: what the part's layer of a cache holds; None before the first token
State = dict[str, Any] | None


class PartStates:
    """Recurrent states of one part of a layer, per recent token.

    Args:
        config: of the model.
        layer: the number of the part's layer.
        history: how many tokens of a prompt may be read again.
    """

    def __init__(self, config: PreTrainedConfig, layer: int, history: int) -> None:
        self._config, self._layer, self._history = config, layer, history
        self._start = torch.zeros(0, dtype=torch.int64)  # of each row, the tokens before the first state
        self._states: list[State] = []  # after none, one, two … of the tokens that were read last

    def read(self, call: PartCall, slots: Tensor, lengths: Sequence[int] | None) -> Any:
        """Run the part over the next tokens.

        Args:
            call: of the part.
            slots: ``[B, T]``, the positions of the tokens, consecutive in each row.
            lengths: number of tokens of each new row; the rest is padding on the right. None: rows continue.
        """
        if lengths is not None:
            return self._begin(call, slots, lengths)
        start = slots[:, 0]
        state = self._chosen(start - self._start)
        places = torch.arange(slots.shape[1], device=slots.device).expand(slots.shape)
        outputs = self._follow(call, state, places)
        self._start = start
        return call.finished(torch.cat(outputs, dim=1))

    def with_rows(self, rows: Tensor) -> PartStates:
        """Copy the states of some rows."""
        copied = copy(self)
        copied._start = self._start[rows]
        copied._states = [_each(state, lambda value: value[rows]) for state in self._states]
        return copied

    def _begin(self, call: PartCall, slots: Tensor, lengths: Sequence[int]) -> Any:
        """Read each prompt at once, and its last tokens one by one.

        Neither reads padding.
        """
        before = [max(0, length - self._history) for length in lengths]
        state: State = None
        pieces: list[tuple[Tensor, Tensor]] = []
        for count in sorted(set(before) - {0}):
            rows = torch.tensor([row for row, own in enumerate(before) if own == count], device=slots.device)
            cache = self._cache(None)
            pieces.append((rows, call.run(cache, rows, torch.arange(count, device=slots.device).expand(len(rows), count))))
            found = self._state(cache)
            state = _with_rows(_zeros(found, len(lengths)) if state is None else state, found, rows)
        start = torch.tensor(before, device=slots.device)
        following = start[:, None] + torch.arange(self._history, device=slots.device)
        steps = self._follow(call, state, following.clamp(max=slots.shape[1] - 1))
        output = steps[0].new_zeros(*slots.shape, *steps[0].shape[2:])
        for rows, piece in pieces:
            output[rows, : piece.shape[1]] = piece
        for place, step in zip(following.unbind(1), steps, strict=True):
            inside = (place < slots.shape[1]).nonzero()[:, 0]
            output[inside, place[inside]] = step[inside, 0]
        self._start = start
        return call.finished(output)

    def _follow(self, call: PartCall, state: State, places: Tensor) -> list[Tensor]:
        """Read tokens one by one, and keep the state after each."""
        cache, rows = self._cache(state), torch.arange(len(places), device=places.device)
        outputs, self._states = [], [state]
        for place in places.unbind(1):
            outputs.append(call.run(cache, rows, place[:, None]))
            self._states.append(self._state(cache))
        return outputs

    def _chosen(self, index: Tensor) -> State:
        """Return each row's state after ``index`` of the tokens read last."""
        states = list(self._states)
        if states[0] is None:  # a state that has seen nothing is zero
            states[0] = _zeros(states[1], len(index))
        rows = torch.arange(len(index), device=index.device)
        return {
            name: tree_map(
                lambda *values: torch.stack(values)[index, rows] if isinstance(values[0], Tensor) else values[-1],
                *(state[name] for state in states if state is not None),
            )
            for name in states[-1] or ()
        }

    def _cache(self, state: State) -> DynamicCache:
        cache = DynamicCache(config=self._config)
        if state is not None:
            vars(cache.layers[self._layer]).update(_each(state, Tensor.clone) or {})
        return cache

    def _state(self, cache: DynamicCache) -> State:
        return _each(dict(vars(cache.layers[self._layer])), Tensor.clone)


class PartCall:
    """Call of a part of a layer, made piece by piece.

    Args:
        plain: runs the part.
        args, kwargs: of the call.
        keeper: the cache among them, which the part does not understand.
        shape: B and T.
    """

    def __init__(
        self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], keeper: object, shape: tuple[int, int]
    ) -> None:
        self._plain, self._args, self._kwargs, self._keeper, self._shape = plain, args, kwargs, keeper, shape
        self._more = 0  # what the part returns behind its hidden states

    def run(self, cache: DynamicCache, rows: Tensor, places: Tensor) -> Tensor:
        """Run some rows at some places ``[rows, count]``."""
        pick = partial(self._pick, cache=cache, rows=rows, places=places)
        output = self._plain(*map(pick, self._args), **{name: pick(value) for name, value in self._kwargs.items()})
        if isinstance(output, Tensor):
            return output
        self._more = len(output) - 1
        return output[0]

    def finished(self, hidden: Tensor) -> Any:
        """Return what the part would have returned."""
        return (hidden, *(None for _ in range(self._more))) if self._more else hidden

    def _pick(self, value: Any, *, cache: DynamicCache, rows: Tensor, places: Tensor) -> Any:
        if value is self._keeper:
            return cache
        if isinstance(value, tuple | list):
            return type(value)(self._pick(item, cache=cache, rows=rows, places=places) for item in value)
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.ndim == 4 and value.shape[2] == self._shape[1] and value.shape[1] != self._shape[1]:
            return None  # a mask of tokens by tokens, which a state needs none of
        if value.shape[0] in (1, self._shape[0]) and value.shape[1] == self._shape[1]:
            return value.expand(self._shape[0], *value.shape[1:])[rows[:, None], places]
        return value


def _each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    if state is None:
        return None
    return {
        name: tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value) for name, value in state.items()
    }


def _zeros(state: State, rows: int) -> State:
    return _each(state, lambda value: value.new_zeros(rows, *value.shape[1:]))


def _with_rows(state: State, found: State, rows: Tensor) -> State:
    """Put what was found for some rows into the state of all."""

    def put(whole: Any, part: Any) -> Any:
        if isinstance(whole, Tensor):
            whole[rows] = part
            return whole
        return part

    return {name: tree_map(put, (state or {})[name], value) for name, value in (found or {}).items()}

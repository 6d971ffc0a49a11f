"""Learned tokens of a store, and their scales."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from wmtp.data.store import TokenStore
from wmtp.data.tokenized import CONTEXT, LEARNED, NEVER

__all__ = ["StoreSegments"]


@frozen(kw_only=True, eq=False)
class StoreSegments:
    """G segments of a store, as a data set learns them.

    Args:
        ends: ``[G]``, the place after the last token of each, counted through the store.
        learned: ``[G]`` bool.
        never: ``[G]`` bool.
        scales: ``[G]`` float32; None: 1 each.
        learned_before: ``[G + 1]``, how many tokens to learn come before each.
        never_before: ``[G + 1]``.
    """

    ends: NDArray[np.int64]
    learned: NDArray[np.bool_]
    never: NDArray[np.bool_]
    scales: NDArray[np.float32] | None
    learned_before: NDArray[np.int64]
    never_before: NDArray[np.int64]

    @classmethod
    def of(cls, store: TokenStore, *, learn_prompt: bool, prompt_weight: float | None, response_weight: float) -> Self:
        """Decide which tokens of a store are learned.

        Args:
            store: the documents.
            learn_prompt: whether prompts are learned too.
            prompt_weight: multiplies a trainer's weights of prompt tokens, which are learned then; None: as they are.
            response_weight: multiplies those of the others.
        """
        kinds = np.asarray(store.segment_kinds)
        learned = kinds == LEARNED
        if learn_prompt or prompt_weight is not None:
            learned = learned | (kinds == CONTEXT)
        scales = None if store.segment_scales is None else np.array(store.segment_scales)
        if prompt_weight not in (None, 1.0) or response_weight != 1.0:
            scales = np.ones(len(kinds), np.float32) if scales is None else scales
            scales[kinds == CONTEXT] *= 1.0 if prompt_weight is None else prompt_weight
            scales[kinds == LEARNED] *= response_weight
        never = kinds == NEVER
        lengths = np.diff(store.segment_ends, prepend=0)
        return cls(
            ends=np.asarray(store.segment_ends),
            learned=learned,
            never=never,
            scales=scales,
            learned_before=np.concatenate([[0], np.cumsum(lengths * learned)]),
            never_before=np.concatenate([[0], np.cumsum(lengths * never)]),
        )

    def count(self, what: Literal["learned", "never"], start: NDArray[np.int64], stop: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count such tokens from each ``start`` to each ``stop``.

        Places count through the store.
        """
        return self._before(what, stop) - self._before(what, start)

    def _before(self, what: Literal["learned", "never"], place: NDArray[np.int64]) -> NDArray[np.int64]:
        flags, before = (self.learned, self.learned_before) if what == "learned" else (self.never, self.never_before)
        if not len(self.ends):
            return np.zeros(len(place), np.int64)
        segment = np.minimum(np.searchsorted(self.ends, place, side="right"), len(self.ends) - 1)
        first = np.where(segment > 0, self.ends[segment - 1], 0)
        return before[segment] + flags[segment] * (place - first)

    def tokens(self, start: int, stop: int) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
        """Return loss mask and scales of the tokens ``start`` to ``stop``.

        A scale multiplies a trainer's weight; None: 1 each.
        """
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left")) + 1
        lengths = np.diff(np.minimum(self.ends[first:last], stop), prepend=start)
        loss_mask = np.repeat(self.learned[first:last], lengths)
        return loss_mask, None if self.scales is None else np.repeat(self.scales[first:last], lengths)

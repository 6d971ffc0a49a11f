"""Contract of what drafts tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Final, Self

import torch
from attrs import evolve
from torch import Tensor

from wmtp.generation.cache import RowCache
from wmtp.generation.decoder import CachedDecoder, Read
from wmtp.generation.products import fast_unembedding
from wmtp.loss import Unembedding
from wmtp.models.anatomy import first_tensor

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["Choose", "Drafter", "at_index"]

#: from head k (2..H), an unembedding, the tokens that it has (None: all) and hidden states ``[B, n, D]`` of the heads from k on
#: to tokens ``[B, n]``; or from those of head k alone and the place ``[B, 1]`` that counts, to ``[B, 1]``
Choose = Callable[[int, Unembedding, "Tensor | None", Tensor, "Tensor | None"], Tensor]

#: a draft vocabulary's tokens come in multiples of so many
_IDS: Final = 64


class Drafter(ABC):
    """Drafts K tokens, by the first K of heads 2..H.

    Args:
        model: with H > K.
        decoder: what reads the rows.
        drafts: K.
    """

    def __init__(self, model: MTPModel, decoder: CachedDecoder, drafts: int) -> None:
        self._model = model
        self._decoder = decoder
        self._heads = model.extra_heads
        self._extra = drafts
        self._caches: list[RowCache] = []  # of the heads' own layers
        ids, device = model.draft_ids, model.anatomy.output.weight.device
        # kernels want a multiple of some tokens: the last one comes several times, of which the first is chosen
        self._ids = None if ids is None else torch.tensor([*ids, *[ids[-1]] * (-len(ids) % _IDS)], device=device)
        self._unembeddings: dict[int, Unembedding] = {}  # by head; with the rows of `_ids` alone

    @abstractmethod
    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """Draft what follows the next token.

        Args:
            read: what the model made of the tokens that it read last.
            last: ``[B]``, of each row the position of the last token that counts; what was read after it was rejected.
            tokens: ``[B, L]``, the rows; the one at ``last + 1`` is known.
            choose: picks tokens from heads' hidden states.

        Returns:
            ``[B, K]``, the tokens for the positions ``last + 2`` and on.
        """

    def with_rows(self, rows: Tensor, decoder: CachedDecoder) -> Self:
        """Copy some rows of everything that is kept between two drafts.

        Args:
            rows: which.
            decoder: that of these rows.
        """
        copied = copy(self)
        copied._decoder = decoder
        copied._caches = [cache.with_rows(rows) for cache in self._caches]
        return copied

    def clear(self) -> None:
        """Forget all tokens, and read the weights again, which may have learned.

        What is kept stays where it is, since graphs read it there.
        """
        for cache in self._caches:
            cache.clear()
        self._take_unembeddings()

    def _take_unembeddings(self) -> None:
        full = {head: fast_unembedding(self._model, head) for head in range(2, self._extra + 2)}
        if self._ids is None:
            self._unembeddings = full
        else:
            self._take_rows(full, self._ids)

    def _take_rows(self, full: dict[int, Unembedding], ids: Tensor) -> None:
        """Copy the draft vocabulary's rows of the unembeddings.

        Heads that share one share the copy.
        """
        taken: dict[int, Unembedding] = {}  # by address
        for head, unembedding in full.items():
            weight = unembedding.weight
            reduced = taken.get(weight.data_ptr()) or self._unembeddings.get(head)
            if reduced is None:
                bias = None if unembedding.bias is None else unembedding.bias.detach()[ids]
                reduced = evolve(unembedding, weight=weight.detach()[ids], bias=bias)
            elif weight.data_ptr() not in taken:  # graphs read it where it is
                reduced.weight.copy_(weight.detach()[ids])
                if reduced.bias is not None and unembedding.bias is not None:
                    reduced.bias.copy_(unembedding.bias.detach()[ids])
            self._unembeddings[head] = taken[weight.data_ptr()] = reduced

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Apply what the model does after its last layer."""
        for step in self._model.anatomy.tail:
            hidden = first_tensor(step(hidden))
        return hidden

    def pick(self, head: int, hidden: Tensor, choose: Choose, at: Tensor | None = None) -> Tensor:
        """Choose drafts of one head, or of several that share an unembedding.

        Args:
            head: the first of them.
            hidden: ``[B, n, D]``.
            choose: see `draft`.
            at: ``[B, 1]``, the place of ``hidden`` that counts. None: all.

        Returns:
            ``[B, n]``, or ``[B, 1]``.
        """
        if not self._unembeddings:
            self._take_unembeddings()
        return choose(head, self._unembeddings[head], self._ids, hidden, at)


def at_index(values: Tensor, index: Tensor) -> Tensor:
    """Of ``[B, T, D]`` the place ``index`` ``[B]`` of each row."""
    return values[torch.arange(len(values), device=values.device), index]

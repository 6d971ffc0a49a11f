"""Drafters: how heads 2..H of each kind propose the tokens after the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor, nn

from wmtp.generation.decoder import CachedDecoder, Read
from wmtp.models.anatomy import first_tensor
from wmtp.models.heads import ChainedBlock

if TYPE_CHECKING:
    from wmtp.generation.cache import RowCache
    from wmtp.models.mtp import MTPModel

__all__ = ["Choose", "Drafter", "make_drafter"]

#: from logits ``[B, V]`` of head k (2..H) to tokens ``[B]``
Choose = Callable[[int, Tensor], Tensor]


class Drafter(ABC):
    """Drafts H−1 tokens.

    Args:
        model: with H ≥ 2.
        decoder: what reads the rows.
    """

    def __init__(self, model: MTPModel, decoder: CachedDecoder) -> None:
        self._model = model
        self._decoder = decoder
        self._heads = model.extra_heads
        self._extra = model.horizon - 1
        self._caches: list[RowCache] = []  # of the heads' own layers

    @abstractmethod
    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """Draft what follows the next token.

        Args:
            read: what the model made of the tokens that it read last.
            last: ``[B]``, of each row the position of the last token that counts; what was read after it was rejected.
            tokens: ``[B, L]``, the rows; the one at ``last + 1`` is known.
            choose: picks tokens from a head's logits.

        Returns:
            ``[B, H−1]``, the tokens for the positions ``last + 2`` and on.
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
        """Forget all tokens; what is kept stays where it is."""
        for cache in self._caches:
            cache.clear()

    def _final_norm(self, hidden: Tensor) -> Tensor:
        for step in self._model.anatomy.tail:
            hidden = first_tensor(step(hidden))
        return hidden

    def _logits(self, head: int, hidden: Tensor) -> Tensor:
        return self._model.unembedding(head).logits(hidden)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Of ``[B, T, D]`` the place ``index`` ``[B]`` of each row."""
    return values[torch.arange(len(values), device=values.device), index]


class ParallelDrafter(Drafter):
    """``linear`` and ``residual``: every head reads head 1's hidden state, and nothing is kept."""

    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """See `Drafter.draft`."""
        hidden = _at(read.hidden, last - read.slots[:, 0])
        drafts = []
        for k in range(2, self._model.horizon + 1):
            own = hidden if self._model.heads.kind == "linear" else self._heads[k - 2](hidden)
            drafts.append(choose(k, self._logits(k, own)))
        return torch.stack(drafts, dim=1)


class BlockDrafter(Drafter):
    """``block``: every head is a decoder layer on the trunk, with keys and values of its own."""

    def __init__(self, model: MTPModel, decoder: CachedDecoder) -> None:
        super().__init__(model, decoder)
        self._caches = [decoder.new_cache() for _ in range(self._extra)]

    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """See `Drafter.draft`."""
        trunk, index = read.call.hidden_states, last - read.slots[:, 0]
        drafts = []
        for k, (head, cache) in enumerate(zip(self._heads, self._caches, strict=True), start=2):
            cache.place_as(self._decoder.cache)
            hidden = self._decoder.with_cache(read.call, cache).repeat(head, trunk)
            drafts.append(choose(k, self._logits(k, self._final_norm(_at(hidden, index)[:, None])[:, 0])))
        return torch.stack(drafts, dim=1)


class ChainDrafter(Drafter):
    """``chained`` and ``shared``: head k reads head k−1's hidden state at t and the token at t+k−1, drafted or known.

    What head k made of position t was made with a draft where t+k−1 was not known yet. So each time it goes over the last
    positions again: those that are new, at most H, and those whose token was a draft, at most H−2.
    """

    def __init__(self, model: MTPModel, decoder: CachedDecoder) -> None:
        super().__init__(model, decoder)
        blocks = [self._heads[0]] * self._extra if model.heads.kind == "shared" else list(self._heads)
        self._blocks: Sequence[nn.Module] = blocks
        self._window = max(1, 2 * model.horizon - 2)
        self._caches = [decoder.new_cache(self._window) for _ in range(self._extra)]
        self._hidden: Tensor | None = None  # head 1's hidden states at all positions, [B, L, D]

    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """See `Drafter.draft`."""
        rows = torch.arange(len(last), device=last.device)[:, None]
        if self._hidden is None:
            self._hidden = read.hidden.new_zeros(len(last), tokens.shape[1], read.hidden.shape[-1])
        if read.lengths is not None:
            slots = read.slots  # the prompt, all of it
        else:
            first = (last - self._window + 1).clamp(min=0)
            slots = first[:, None] + torch.arange(self._window, device=last.device)
        self._hidden[rows, read.slots] = read.hidden
        call = self._decoder.call_at(slots, read.width)
        tokens, index = tokens.clone(), last - slots[:, 0]
        hidden = self._hidden[rows, slots]
        drafts = []
        for ahead, (block, cache) in enumerate(zip(self._blocks, self._caches, strict=True), start=1):
            cache.place(slots, None, read.width, read.lengths)
            embedding = self._model.anatomy.embedding(tokens[rows, slots + ahead])
            hidden = self._final_norm(cast(ChainedBlock, block)(hidden, embedding, self._decoder.with_cache(call, cache)))
            drafts.append(choose(ahead + 1, self._logits(ahead + 1, _at(hidden, index))))
            tokens[rows[:, 0], last + ahead + 1] = drafts[-1]
        return torch.stack(drafts, dim=1)

    def with_rows(self, rows: Tensor, decoder: CachedDecoder) -> Self:
        """See `Drafter.with_rows`."""
        copied = super().with_rows(rows, decoder)
        copied._hidden = None if self._hidden is None else self._hidden[rows]
        return copied


_DRAFTERS: dict[str, type[Drafter]] = {
    "block": BlockDrafter,
    "linear": ParallelDrafter,
    "residual": ParallelDrafter,
    "chained": ChainDrafter,
    "shared": ChainDrafter,
}


def make_drafter(model: MTPModel, decoder: CachedDecoder) -> Drafter:
    """Make the drafter for the model's kind of heads."""
    return _DRAFTERS[model.heads.kind](model, decoder)

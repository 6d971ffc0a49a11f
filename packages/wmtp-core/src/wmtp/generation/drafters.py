"""Drafters: how heads 2..H of each kind propose tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wmtp.generation.chain_drafters import chain_drafter
from wmtp.generation.decoder import CachedDecoder, Read
from wmtp.generation.drafting import Choose, Drafter, at_index

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["Choose", "Drafter", "make_drafter"]


class ParallelDrafter(Drafter):
    """Drafter of ``linear`` and ``residual`` heads.

    Each reads head 1's hidden state, and nothing is kept.
    """

    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """See `Drafter.draft`."""
        hidden = at_index(read.hidden, last - read.slots[:, 0])[:, None]
        if self._model.heads.kind == "linear":
            return torch.cat([self.pick(k, hidden, choose) for k in range(2, self._extra + 2)], dim=1)
        return self.pick(2, torch.cat([head(hidden) for head in self._heads[: self._extra]], dim=1), choose)


class BlockDrafter(Drafter):
    """Drafter of ``block`` heads.

    Each is a decoder layer on the trunk, with keys and values of its own.
    """

    def __init__(self, model: MTPModel, decoder: CachedDecoder, drafts: int) -> None:
        super().__init__(model, decoder, drafts)
        self._caches = [decoder.new_cache() for _ in range(self._extra)]

    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """See `Drafter.draft`."""
        trunk, index = read.trunk, last - read.slots[:, 0]
        hidden = []
        for head, cache in zip(self._heads[: self._extra], self._caches, strict=True):
            cache.place_as(self._decoder.cache)
            hidden.append(at_index(self._decoder.with_cache(read.call, cache).repeat(head, trunk), index))
        return self.pick(2, self.final_norm(torch.stack(hidden, dim=1)), choose)


_DRAFTERS: dict[str, type[Drafter]] = {"block": BlockDrafter, "linear": ParallelDrafter, "residual": ParallelDrafter}


def make_drafter(model: MTPModel, decoder: CachedDecoder, drafts: int) -> Drafter:
    """Make the drafter for the model's kind of heads."""
    kind = model.heads.kind or "block"
    return _DRAFTERS[kind](model, decoder, drafts) if kind in _DRAFTERS else chain_drafter(model, decoder, drafts)

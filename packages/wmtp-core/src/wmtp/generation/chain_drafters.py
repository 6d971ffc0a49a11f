"""Drafts of heads fed by the one before: ``chained``, ``shared``, ``native``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from attrs import frozen
from torch import Tensor, nn

from wmtp.generation.cache import RowCache
from wmtp.generation.choosing import taken
from wmtp.generation.decoder import CachedDecoder, Read
from wmtp.generation.drafting import Choose, Drafter
from wmtp.loss import Unembedding
from wmtp.models.anatomy import LayerCall
from wmtp.models.chains import ChainedBlock, blocks_of, embeddings_of, step_embedding
from wmtp.models.few_rows import step_code
from wmtp.models.native.layouts import ChainRule
from wmtp.models.step_cache import steps_are_compiled

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["ChainDrafter", "ChainParts", "chain_drafter"]


class _ChainedHeads(Drafter):
    """Shared parts of both ways to draft with a chain."""

    def __init__(self, model: MTPModel, decoder: CachedDecoder, drafts: int) -> None:
        super().__init__(model, decoder, drafts)
        self._blocks = blocks_of(model.extra_heads, self._extra)
        self._embeddings = embeddings_of(model.extra_heads, self._extra)

    @property
    def _compiled(self) -> bool:
        return self._model.compiled_layers and steps_are_compiled()

    def _first_input(self, read: Read) -> Tensor:
        return read.raw if self._blocks[0].rule.before_norm else read.hidden

    def _step(
        self,
        ahead: int,
        previous: Tensor,
        following: Tensor,
        drafts: list[Tensor],
        index: Tensor,
        slots: Tensor,
        call: LayerCall,
    ) -> Tensor:
        """Run step ``ahead`` (from 1) of the chain.

        Returns hidden states ``[B, T, D]``, which its unembedding multiplies.

        Args:
            ahead: which.
            previous: ``[B, T, D]``.
            following: ``[B, ≥ T]``, the tokens that it reads first, before drafts are among them.
            drafts: ``[B, 1]`` each.
            index: ``[B, 1]``, where the last of them is.
            slots: ``[B, T]``, the positions of ``previous``.
            call: of the layer, with the step's cache.
        """
        block, own = self._blocks[ahead - 1], self._embeddings[ahead - 1]
        embedding = self._model.anatomy.embedding if own is None else own
        embed = step_code(_embed, compiled=self._compiled)
        hidden = block(previous, embed(block.rule, ahead, embedding, following, drafts, index, slots), call)
        return self.final_norm(hidden) if block.rule.output == "model" else hidden


class ServerDrafter(_ChainedHeads):
    """Drafter that repeats one module, as servers do.

    The first step reads what the model read, each later one a single token. A later step stands one position further, reads the
    draft before it, and sees the first step's keys and values of all positions before its own: there is one cache, which the
    next draft's first step writes again.
    """

    def __init__(self, model: MTPModel, decoder: CachedDecoder, drafts: int) -> None:
        super().__init__(model, decoder, drafts)
        self._caches = [decoder.new_cache()]

    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """See `Drafter.draft`."""
        [cache] = self._caches
        rows = torch.arange(len(last), device=last.device)
        cache.place_as(self._decoder.cache)
        call = self._decoder.with_cache(read.call, cache)
        following = tokens[rows[:, None], read.slots + 1]
        index = (last - read.slots[:, 0])[:, None]
        hidden = self._step(1, self._first_input(read), following, [], index, read.slots, call)
        drafts, hidden = [self.pick(2, hidden, choose, index)], taken(hidden, index)
        width = min(read.width + self._extra, self._decoder.capacity)  # known without asking the device
        for ahead in range(2, self._extra + 1):
            slots = (last + ahead - 1)[:, None]
            cache.place(slots, None, width)
            call = self._decoder.with_cache(self._decoder.call_at(slots, width), cache)
            hidden = self._step(ahead, hidden, drafts[-1], [], index, slots, call)
            drafts.append(self.pick(ahead + 1, hidden, choose))
        return torch.cat(drafts, dim=1)


@frozen(eq=False)
class ChainParts:
    """Parts of a chain, of each step one.

    Args:
        blocks, embeddings, caches, unembeddings: of each step.
        ids: the tokens that the unembeddings have; None: all.
        hidden: ``[B, L, D]``, what the first step reads, at all positions.
        window: how many positions each step goes over.
    """

    blocks: list[ChainedBlock]
    embeddings: list[nn.Embedding]
    caches: list[RowCache]
    unembeddings: list[Unembedding]
    ids: Tensor | None
    hidden: Tensor
    window: int


class ChainDrafter(_ChainedHeads):
    """Drafter whose steps run as they are trained.

    Head k reads head k−1's hidden state at t and the token at t+k−1, drafted or known. What head k made of position t was made
    with a draft where t+k−1 was not known yet. So each time it goes over the last K + 1 positions: those that are new, and
    those whose token was a wrong draft, which are the fewer the more are new.
    """

    def __init__(self, model: MTPModel, decoder: CachedDecoder, drafts: int) -> None:
        super().__init__(model, decoder, drafts)
        # a graph drafts before the CPU decides ties, and then perhaps once more, K−1 wrong tokens later
        self._window, self._again = drafts + 1, drafts - 1
        self._caches = [decoder.new_cache(self._window + self._again) for _ in range(self._extra)]
        self._hidden: Tensor | None = None  # what the first step reads, at all positions, [B, L, D]

    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """See `Drafter.draft`."""
        if self._hidden is None:
            self._hidden = read.hidden.new_zeros(len(last), tokens.shape[1], read.hidden.shape[-1])
        window = self._window + self._again * read.again if read.lengths is None else None  # None: the prompt, all of it
        slots, following, hidden, index = step_code(_begin, compiled=self._compiled)(
            self._hidden, self._first_input(read), read.slots, last, tokens, window, self._extra
        )
        call, count = self._decoder.call_at(slots, read.width), slots.shape[1]
        drafts: list[Tensor] = []
        for ahead, cache in enumerate(self._caches, start=1):
            if drafts:
                cache.place_as(self._caches[0])
            else:
                cache.place(slots, None, read.width, read.lengths)
            known = following[:, ahead - 1 : ahead - 1 + count]
            hidden = self._step(ahead, hidden, known, drafts, index, slots, self._decoder.with_cache(call, cache))
            drafts.append(self.pick(ahead + 1, hidden, choose, index))
        return torch.cat(drafts, dim=1)

    def parts(self) -> ChainParts | None:
        """Return what kernels need to draft; None before the first draft."""
        if self._hidden is None:
            return None
        own = [self._model.anatomy.embedding if each is None else each for each in self._embeddings]
        unembeddings = [self._unembeddings[head] for head in range(2, self._extra + 2)]
        return ChainParts(self._blocks, own, self._caches, unembeddings, self._ids, self._hidden, self._window)

    def with_rows(self, rows: Tensor, decoder: CachedDecoder) -> Self:
        """See `Drafter.with_rows`."""
        copied = super().with_rows(rows, decoder)
        copied._hidden = None if self._hidden is None else self._hidden[rows]
        return copied


def _embed(
    rule: ChainRule, ahead: int, embedding: nn.Module, ids: Tensor, drafts: list[Tensor], index: Tensor, slots: Tensor
) -> Tensor:
    places = torch.arange(ids.shape[1], device=ids.device)
    for behind, draft in enumerate(reversed(drafts)):
        ids = torch.where(places == index - behind, draft, ids)
    return step_embedding(rule, ahead, embedding(ids), slots)


def _begin(
    kept: Tensor, given: Tensor, read: Tensor, last: Tensor, tokens: Tensor, window: int | None, extra: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep what was read, and take what the first step reads.

    Args:
        kept: ``[B, L, D]``, hidden states, in place.
        given: ``[B, T, D]``, new ones.
        read: ``[B, T]``, their positions.
        last: ``[B]``, the last position of each row that counts.
        tokens: ``[B, L]``.
        window: how many positions are taken. None: those that were read.
        extra: tokens after the first position's next one.

    Returns:
        positions ``[B, W]``, a copy of the tokens from the one after the first of them on, their hidden states ``[B, W, D]``,
        and the place ``[B, 1]`` of ``last`` among them.
    """
    last, rows = last[:, None], torch.arange(len(last), device=last.device)[:, None]
    kept[rows, read] = given
    slots = read if window is None else (last - window + 1).clamp(min=0) + torch.arange(window, device=last.device)
    following = tokens[rows, slots[:, :1] + torch.arange(1, slots.shape[1] + extra, device=last.device)]
    return slots, following, kept[rows, slots], last - slots[:, :1]


def chain_drafter(model: MTPModel, decoder: CachedDecoder, drafts: int) -> Drafter:
    """Make the drafter for a chain.

    One module drafts as servers do, several as they are trained. Servers hand no state on from token to token inside of such a
    module, so one that keeps a state drafts as it is trained.
    """
    modules = {id(block) for block in blocks_of(model.extra_heads, model.horizon - 1)}
    served = len(modules) == 1 and (model.heads.kind == "native" or model.heads.layout != "plain")
    keeps_state = any(True for _ in model.packing.find_mixers(block.layer for block in blocks_of(model.extra_heads, 1)))
    return (ServerDrafter if served and not keeps_state else ChainDrafter)(model, decoder, drafts)

"""Greedy steps of one text by our own kernels.

`wmtp.models.layer_steps` says where they fit. What is left of a step to other code is the same as for any batch: prompts, ties,
and drafts of heads that are no chain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch
from attrs import frozen
from torch import Tensor

from wmtp.generation.chain_drafters import ChainDrafter, ChainParts
from wmtp.generation.choosing import TIE
from wmtp.generation.decoder import CachedDecoder, Read
from wmtp.generation.drafting import Drafter
from wmtp.loss import Unembedding
from wmtp.models.layer_steps import begins_by_kernel, block_step, chooses_by_kernel, is_table, norm_of
from wmtp.models.step_cache import layer_number, swap_caches

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel
    from wmtp.models.step_kernels import Judged, Rows, Tables

__all__ = ["KernelStep", "Letter", "kernel_step"]

#: seconds after which the device is asked whether it has failed
_PATIENCE: Final = 5.0


class Letter:
    """Numbers that a kernel writes into the CPU's memory.

    So the CPU has them while the device goes on with the same step, and needs no copy for them. Each is at least 0, and
    written at once: those that are missing are −1.

    Args:
        numbers: how many.
        device: that writes them.
    """

    def __init__(self, numbers: int, device: torch.device) -> None:
        self.numbers = torch.full((numbers,), -1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device, self._seen = device, self.numbers.numpy()

    def clear(self) -> None:
        """Expect the numbers anew: before a step begins."""
        self._seen.fill(-1)

    def tolist(self) -> list[list[int]]:
        """Wait for the numbers, and return them as those of one row."""
        found = self._seen.tolist()
        if -1 in found:
            found = self._wait()
        return [found]

    def _wait(self) -> list[int]:
        end = time.monotonic() + _PATIENCE
        while True:
            for _ in range(1000):
                found: list[int] = self._seen.tolist()
                if -1 not in found:
                    return found
                time.sleep(0)  # other threads may have the interpreter meanwhile
            if time.monotonic() > end and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # raises what went wrong there
                if -1 in self._seen.tolist():
                    raise RuntimeError("a step of decoding ended without a result")


@frozen(eq=False)
class _Chain:
    """A chain's steps."""

    parts: ChainParts
    rows: Rows
    layers: list[Callable[[Tensor], Tensor]]


class KernelStep:
    """Steps of one text.

    All that it needs stays where it is, as graphs want it.

    Args:
        model: in eval mode.
        decoder: that has read the prompt.
        drafter: that has drafted after it; None: nothing drafts.
        unembedding: of head 1.
        text: its tokens ``[1, L]``, how many are known ``[1]``, and ``[1]``, 0 where it is finished.
        drafts: ``[1, K]``, the place of those to read.
        width: slots that attention looks at.
    """

    def __init__(
        self, model: MTPModel, decoder: CachedDecoder, drafter: Drafter | None, unembedding: Unembedding,
        text: tuple[Tensor, Tensor, Tensor], drafts: Tensor, width: int,
    ) -> None:  # fmt: skip
        from wmtp.models.step_kernels import Judged, Rows, Tables

        self._model, self._decoder, self._drafter = model, decoder, drafter
        self._unembedding, self._text, self._drafts, self._width = unembedding, text, drafts, width
        self._tables: Tables = Tables(*decoder.tables(width))
        count, device = drafts.shape[1], drafts.device
        self._rows: Rows = Rows.like(self._tables, 1 + count)
        self.letter = Letter(3 + 2 * count, device)
        numbers = torch.zeros(count + 3, dtype=torch.int64, device=device)
        accepted, following, last = numbers[count:].split(1)
        self.judged: Judged = Judged(numbers[None, :count], accepted, following, last, self.letter.numbers)
        self._chain = self._open_chain()

    @property
    def drafts_too(self) -> bool:
        """Tell whether the heads draft by kernels too."""
        return self._chain is not None

    def read(self) -> tuple[Read | None, Tensor]:
        """Read the last known token and the drafts, and write what follows.

        Returns:
            results of reading, where something drafts from them; and head 1's choices ``[1, 1 + K]``. `judged` is written.
        """
        from wmtp.models.head_kernels import best_two, normalize
        from wmtp.models.step_kernels import begin, settle

        rows, norm = self._rows, norm_of(self._model.anatomy.tail[0])
        x = begin(self._text[0], self._text[1], self._drafts, self._model.anatomy.embedding.weight, self._tables, rows)
        raw, trunk, call = self._decoder.read_embedded(x, rows.slots, (rows.cos, rows.sin), rows.mask)
        read, kept, window = None, None, None
        if self._drafter is None:
            found = best_two(raw, self._unembedding.weight, norm)
        else:
            hidden = normalize(raw, norm)
            found = best_two(hidden, self._unembedding.weight)
            read = Read(hidden=hidden, raw=raw, trunk=trunk, call=call, slots=rows.slots, width=self._width, lengths=None)
            if self._chain is not None:
                parts, window = self._chain.parts, self._chain.rows
                kept = raw if parts.blocks[0].rule.before_norm else hidden, parts.hidden
        settle(found, TIE, rows.slots, self._text, self._drafts, self.judged, self._tables, kept, window)
        return read, found[0]

    def draft(self) -> None:
        """Draft by kernels what follows, into the drafts' place."""
        from wmtp.models.head_kernels import best
        from wmtp.models.step_kernels import join_tokens

        assert self._chain is not None, "asked before"
        parts, slots = self._chain.parts, self._chain.rows.slots
        tokens, known, _ = self._text
        x, output, text = parts.hidden, None, (tokens, known, self._drafts)
        for step, (block, layer) in enumerate(zip(parts.blocks, self._chain.layers, strict=True)):
            norms = output, norm_of(block.hidden_norm), norm_of(block.embedding_norm)
            embedding, weight = parts.embeddings[step].weight, block.projection.weight
            x = join_tokens(x, step + 1, slots, text, embedding, norms, weight, block.rule)
            x = layer(x)
            output = self._output_norm(parts, step)
            best(x[:, -1:], parts.unembeddings[step].weight, parts.ids, None, output, self._drafts[:, step : step + 1])

    def _output_norm(self, parts: ChainParts, step: int) -> tuple[Tensor, float] | None:
        block = parts.blocks[step]
        if block.rule.output == "model":
            return norm_of(self._model.anatomy.tail[0])
        return None if block.output_norm is None else norm_of(block.output_norm)

    def _open_chain(self) -> _Chain | None:
        from wmtp.models.step_kernels import Rows

        if type(self._drafter) is not ChainDrafter or (parts := self._drafter.parts()) is None:
            return None
        rows = Rows.like(self._tables, parts.window)
        layers: list[Callable[[Tensor], Tensor]] = []
        last = parts.hidden[:, -1:]
        for block, cache, unembedding, embedding in zip(
            parts.blocks, parts.caches, parts.unembeddings, parts.embeddings, strict=True
        ):
            number = layer_number(block)
            if number is None or not chooses_by_kernel(unembedding, last) or not is_table(embedding):
                return None
            cache.place(rows.slots, None, self._width)
            call = self._decoder.with_cache(self._decoder.layer_call(rows.slots, (rows.cos, rows.sin), rows.mask), cache)
            # nothing reads what the last step makes of earlier positions
            is_last = len(layers) + 1 == len(parts.blocks)
            layer = block_step(block, parts.window, swap_caches(call, number), last=is_last)
            if layer is None:
                return None
            layers.append(layer)
        return _Chain(parts, rows, layers)


def kernel_step(
    model: MTPModel, decoder: CachedDecoder, drafter: Drafter | None, unembedding: Unembedding,
    text: tuple[Tensor, Tensor, Tensor], drafts: Tensor, width: int,
) -> KernelStep | None:  # fmt: skip
    """Make steps by kernels, of `KernelStep`'s arguments; None: they do not fit."""
    tokens = 1 + drafts.shape[1]
    if len(drafts) > 1 or not drafts.is_contiguous() or not begins_by_kernel(model.anatomy, tokens, width):
        return None
    hidden = model.anatomy.embedding.weight[:1].expand(tokens, -1).contiguous()[None]
    if not chooses_by_kernel(unembedding, hidden):
        return None
    return KernelStep(model, decoder, drafter, unembedding, text, drafts, width)

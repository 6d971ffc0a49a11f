"""The loss on a GPU: matrix products by cuBLAS, all between them by Triton kernels, and nothing that the host waits for.

The predictions of all heads that share an unembedding stand in one list, sorted on the device: those with a coefficient, then
those that are only measured, then the rest. Chunks of the list go through

    logits = h Wᵀ   →   token losses and, in place, d logits   →   d W += d logitsᵀ h (fp32)   →   d h = d logits W

and those behind the last one with a coefficient through the first product only. How long the parts of the list are must be
known on the host, which starts the products. It is known there without asking the device where the caller says so (from a batch
on the CPU, or a share that is kept). Where not, the two lengths are copied to the host in the background, and the host
looks at them only after it has started two more chunks of products: it never lets the device run dry. No number of
predictions that the caller states can go wrong silently: if it was too small, the loss is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import torch
import triton
from attrs import Factory, frozen
from torch import Tensor

from wmtp.loss import kernels
from wmtp.loss.problem import Answer, HeadLayout, Problem

__all__ = ["chunk_rows", "compute", "scaled"]

_kernels: Any = kernels  # the decorator of Triton hides what it returns

# A chunk is as large as the first that the second allows it to be: products get slower below 2048 rows, where few tiles are
# left for each multiprocessor.
_CHUNK_BYTES = 240 * 2**20
_LARGE_CHUNK_BYTES = 512 * 2**20
_FEW_ROWS = 2048

# chunks that are started before the host looks at counts that it was not told
_AHEAD = 2


@frozen(kw_only=True, eq=False)
class _List:
    """The predictions of all heads that share an unembedding, as they are computed.

    Args:
        places: which heads, from 0.
        layout: their common layout.
        order: ``[M]``; see `wmtp.loss.kernels`.
        kind: ``[M]``.
        targets: ``[M]``.
        coefficients: ``[M]`` fp32.
        counts: ``[2]``, how many have a coefficient, and how many have one or are measured.
        at_most: bounds of both that the host was told, or None.
        learns: whether there are coefficients at all.
    """

    places: range
    layout: HeadLayout
    order: Tensor
    kind: Tensor
    targets: Tensor
    coefficients: Tensor
    counts: Tensor
    at_most: tuple[int, int] | None
    learns: bool


def chunk_rows(vocabulary: int, itemsize: int) -> int:
    """How many rows of logits are made at once."""
    row = _stride(vocabulary, itemsize) * itemsize
    rows = max(_CHUNK_BYTES // row, min(_FEW_ROWS, _LARGE_CHUNK_BYTES // row), 1)
    # products of 2048 and 3072 rows fill the multiprocessors best
    step = next(step for step in (1024, 128, 1) if rows >= step)
    return rows - rows % step


def compute(problem: Problem) -> Answer:
    """See `Problem` and `Answer`."""
    positions, horizon = problem.ids.shape
    lists = [_sort(problem, layout, places) for layout, places in _runs(problem.heads)]
    losses = torch.zeros(horizon, positions, dtype=torch.float32, device=problem.ids.device)
    lse = torch.zeros_like(losses) if problem.lse is None else problem.lse.float().T.contiguous()
    state = _State(
        problem=problem,
        cast=problem.cast(),
        losses=losses,
        lse=lse,
        entropies=torch.zeros_like(losses) if problem.entropy else None,
        gradients=[
            torch.zeros(t.shape, dtype=t.dtype, device=t.device) if problem.wants(i) else None
            for i, t in enumerate(problem.tensors[:horizon])
        ],
    )
    lengths = _Lengths(lists)
    for number, predictions in enumerate(lists):
        for start, stop, learned in lengths.chunks(number, _rows_of(state.cast[predictions.layout.weight])):
            state.run(predictions, start, stop, learned)
    return Answer(
        losses=losses.T,
        lse=lse.T,
        entropy=None if state.entropies is None else state.entropies.clamp_(min=0.0).T,
        gradients=state.all_gradients(),
        broken=lengths.broken(),
    )


def _runs(heads: Sequence[HeadLayout]) -> list[tuple[HeadLayout, range]]:
    """Neighbouring heads that share everything, and which they are."""
    runs: list[tuple[HeadLayout, range]] = []
    for place, layout in enumerate(heads):
        if runs and runs[-1][0] == layout:
            runs[-1] = layout, range(runs[-1][1].start, place + 1)
        else:
            runs.append((layout, range(place, place + 1)))
    return runs


def _sort(problem: Problem, layout: HeadLayout, places: range) -> _List:
    """Order the predictions of some heads by kind. Nothing here is read by the host."""
    heads = slice(places.start, places.stop)
    valid = problem.valid[:, heads].T.reshape(-1)
    if problem.coefficients is None:
        coefficients = torch.zeros(valid.shape, dtype=torch.float32, device=valid.device)
    else:
        coefficients = problem.coefficients[:, heads].T.reshape(-1).float()
    learned = coefficients != 0
    if problem.lse is not None:
        valid = learned
    kind = torch.where(learned, 0, torch.where(valid, 1, 2)).to(torch.uint8)
    bound = len(kind) if problem.valid_counts is None else min(sum(problem.valid_counts[k] for k in places), len(kind))
    most = 0 if problem.coefficients is None else problem.at_most
    at_most = None
    if most is not None and (problem.lse is not None or problem.valid_counts is not None):
        at_most = min(most, bound), min(most, bound) if problem.lse is not None else bound
        bound = at_most[1]
    kind, order = torch.sort(kind, stable=True)
    order, kind = order[:bound], kind[:bound]
    return _List(
        places=places,
        layout=layout,
        order=order,
        kind=kind,
        targets=problem.ids[:, heads].T.reshape(-1)[order],
        coefficients=coefficients[order],
        counts=torch.stack([learned.sum(), (learned | valid).sum()]),
        at_most=at_most,
        learns=problem.coefficients is not None,
    )


class _Lengths:
    """How long the parts of the lists are, read from the device only where nobody said it, and late."""

    def __init__(self, lists: Sequence[_List]) -> None:
        self._lists = lists
        self._started = 0
        self._told = [predictions.at_most for predictions in lists]
        self._arrived: torch.cuda.Event | None = None
        self._host: Tensor | None = None
        if None in self._told:
            counts = torch.stack([predictions.counts for predictions in lists])
            if counts.is_cuda:
                self._host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
                self._host.copy_(counts, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record()
            else:
                self._host = counts

    def chunks(self, number: int, rows: int) -> Iterator[tuple[int, int, bool]]:
        """First and last row of each chunk of a list, and whether it has predictions with a coefficient."""
        start = 0
        total = len(self._lists[number].order)
        while self._told[number] is None and self._started < _AHEAD and start < total:
            self._started += 1
            yield start, min(start + rows, total), self._lists[number].learns
            start += rows
        learned, measured = self._read(number)
        for first, last, has_coefficients in ((start, learned, True), (max(start, learned), measured, False)):
            if last <= first:
                continue
            # chunks of about equal size, in whole tiles: a small one is slow
            equal = ceil((last - first) / ceil((last - first) / rows))
            size = min(ceil(equal / 128) * 128, rows)
            for at in range(first, last, size):
                yield at, min(at + size, last), has_coefficients

    def _read(self, number: int) -> tuple[int, int]:
        told = self._told[number]
        if told is not None:
            return told
        assert self._host is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        learned, measured = self._host[number].tolist()
        return learned, measured

    def broken(self) -> Tensor | None:
        """On the device: whether a number that the host was told was too small."""
        wrong = [
            (predictions.counts[0] > predictions.at_most[0]) | (predictions.counts[1] > predictions.at_most[1])
            for predictions in self._lists
            if predictions.at_most is not None
        ]
        return torch.stack(wrong).any() if wrong else None


@frozen(kw_only=True, eq=False)
class _State:
    """What chunks read and write."""

    problem: Problem
    cast: dict[int, Tensor]
    losses: Tensor
    lse: Tensor
    entropies: Tensor | None
    gradients: list[Tensor | None]
    sums: dict[int, Tensor] = Factory(dict)
    buffers: dict[tuple[str, torch.dtype], Tensor] = Factory(dict)

    def run(self, predictions: _List, start: int, stop: int, learned: bool) -> None:
        """Compute one chunk of a list."""
        problem, layout, places = self.problem, predictions.layout, predictions.places
        weight = self.cast[layout.weight]
        (vocabulary, width), positions, count = weight.shape, len(problem.ids), stop - start
        order, kind = predictions.order[start:stop], predictions.kind[start:stop]
        block = min(triton.next_power_of_2(width), 4096)

        hidden = self._buffer("hidden", count, width, weight)
        for slot, place in enumerate(places):
            source = problem.tensors[place]
            source = source if source.stride(1) == 1 else source.contiguous()
            _kernels.gather_kernel[(count,)](source, source.stride(0), hidden, order, kind, slot, positions, width, BLOCK=block)
        # rows that start at multiples of 128 bytes, whatever the vocabulary
        logits = self._buffer("logits", count, _stride(vocabulary, weight.element_size()), weight)[:, :vocabulary]
        if layout.bias is None:
            torch.mm(hidden, weight.T, out=logits)
        else:
            torch.addmm(self.cast[layout.bias], hidden, weight.T, out=logits)

        learns = [place for place in places if problem.wants(place)]
        gradient = learned and (bool(learns) or problem.wants(layout.weight) or problem.wants(layout.bias))
        factors = self._softmax(predictions, start, stop, logits, gradient)
        if not gradient:
            return
        if layout.bias is not None and problem.wants(layout.bias):
            total = logits.sum(0, dtype=torch.float32)
            self.sums[layout.bias] = self.sums[layout.bias] + total if layout.bias in self.sums else total
        if problem.wants(layout.weight):
            if factors is not None:
                _kernels.scale_kernel[(count,)](hidden, factors, width, BLOCK=block)
            self._add_product(layout.weight, logits, hidden)
        if learns:
            scale = factors is not None
            rows = self._hidden_gradient(logits, weight, scale)
            for slot, place in enumerate(places):
                to = self.gradients[place]
                if to is not None:
                    _kernels.scatter_kernel[(count,)](
                        rows, factors, to, order, kind, slot, positions, width, SCALE=scale, BLOCK=block
                    )

    def all_gradients(self) -> list[Tensor | None]:
        """Of every tensor, once all chunks are through."""
        gradients = list(self.gradients)
        for place in range(len(gradients), len(self.problem.tensors)):
            if not self.problem.wants(place):
                gradients.append(None)
            elif place in self.sums:
                gradients.append(self.sums[place])
            else:
                gradients.append(torch.zeros_like(self.problem.tensors[place], dtype=torch.float32))
        return gradients

    def _softmax(self, predictions: _List, start: int, stop: int, logits: Tensor, gradient: bool) -> Tensor | None:
        """From logits to token losses and, in place, their gradient: divided by the factors ``[rows]``, if there are any."""
        problem, layout, places = self.problem, predictions.layout, predictions.places
        heads, part = slice(places.start, places.stop), slice(start, stop)
        order, kind, targets = predictions.order[part], predictions.kind[part], predictions.targets[part]
        lse = self.lse[heads].view(-1)
        losses = self.losses[heads].view(-1)
        rows = logits, logits.stride(0), logits.shape[1], order, kind, targets
        form = {"scale": float(layout.scale), "softcap": float(layout.softcap or 1.0), "SOFTCAP": layout.softcap is not None}
        grid = (stop - start,)
        known = problem.lse is not None
        if gradient and not known and logits.dtype != torch.float16 and not problem.wants(layout.bias):
            factors = self._buffer("factors", stop - start, 1, self.losses).view(-1)
            coefficients = predictions.coefficients[part]
            _kernels.single_pass_kernel[grid](*rows, coefficients, factors, losses, lse, **form, **_blocks(logits))
            return factors
        if not known:
            entropies = None if self.entropies is None else self.entropies[heads].view(-1)
            entropy = entropies is not None and problem.top_k is None
            _kernels.measure_kernel[grid](*rows, losses, lse, entropies, **form, ENTROPY=entropy, **_blocks(logits))
            if entropies is not None and problem.top_k is not None:
                entropies[order] = torch.where(kind < 2, _top_entropy(logits, layout, problem.top_k), 0.0)
        if gradient:
            _kernels.gradient_kernel[grid](*rows, predictions.coefficients[part], lse, **form, **_blocks(logits, 16384))
        return None

    def _hidden_gradient(self, delta: Tensor, weight: Tensor, scale: bool) -> Tensor:
        """``delta · weight``; in fp32 where it is scaled before it is rounded."""
        exact = scale and _adds_in_fp32(delta)
        rows = self._buffer("gradient", len(delta), weight.shape[1], self.losses if exact else weight)
        return torch.mm(delta, weight, out_dtype=torch.float32, out=rows) if exact else torch.mm(delta, weight, out=rows)

    def _add_product(self, place: int, delta: Tensor, hidden: Tensor) -> None:
        """``sums[place] += deltaᵀ · hidden``, added in fp32 within the product where the library can."""
        total = self.sums.get(place)
        first = total is None
        if total is None:
            total = self.sums[place] = torch.empty(delta.shape[1], hidden.shape[1], dtype=torch.float32, device=delta.device)
        if delta.dtype == torch.float32:
            torch.mm(delta.T, hidden, out=total) if first else total.addmm_(delta.T, hidden)
        elif _adds_in_fp32(delta):
            if first:
                torch.mm(delta.T, hidden, out_dtype=torch.float32, out=total)
            else:
                torch.addmm(total, delta.T, hidden, out_dtype=torch.float32, out=total)
        elif first:
            total.copy_(delta.T @ hidden)
        else:
            total += delta.T @ hidden

    def _buffer(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """One piece of memory for all chunks."""
        key = name, like.dtype
        kept = self.buffers.get(key)
        if kept is None or len(kept) < rows * columns:
            kept = self.buffers[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return kept[: rows * columns].view(rows, columns)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, may_change: bool) -> Tensor:
    """``gradient · factor`` in a precision; in place where that is allowed and possible."""
    same = may_change and gradient.dtype == dtype
    out = gradient if same else torch.empty_like(gradient, dtype=dtype)
    if gradient.numel() > 0:
        block = 4096
        grid = (triton.cdiv(gradient.numel(), block),)
        _kernels.finish_kernel[grid](gradient, out, factor, gradient.numel(), SAME=same, BLOCK=block)
    return out


def _adds_in_fp32(operand: Tensor) -> bool:
    """Whether products of such operands can come out in fp32."""
    half = operand.dtype in (torch.bfloat16, torch.float16)
    return half and operand.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(operand.device)[0] >= 8


def _rows_of(weight: Tensor) -> int:
    return chunk_rows(len(weight), weight.element_size())


def _stride(vocabulary: int, itemsize: int) -> int:
    """The smallest number of logits that is no less than V and takes a multiple of 128 bytes."""
    step = 128 // itemsize
    return -(-vocabulary // step) * step


def _blocks(logits: Tensor, largest: int = 8192) -> dict[str, int]:
    """How much of a row is read at once, and by how many warps: measured, see docs/performance.md."""
    block = min(triton.next_power_of_2(logits.shape[1]), largest)
    return {"BLOCK": block, "num_warps": max(block // 1024, 1)}


def _top_entropy(logits: Tensor, layout: HeadLayout, top_k: int) -> Tensor:
    """Of each row, over its most probable tokens."""
    top = logits.topk(min(top_k, logits.shape[1]), sorted=False).values.float() * layout.scale
    if layout.softcap is not None:
        top = torch.tanh(top / layout.softcap) * layout.softcap
    return torch.special.entr(top.softmax(dim=1)).sum(dim=1)

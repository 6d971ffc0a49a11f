"""Loss on a GPU: cuBLAS products, the rest Triton, no synchronization.

The predictions of all heads that share an unembedding form one list, sorted on the device: those with a coefficient, then those
that are only measured, then the rest. Chunks of the list go through

    logits = h Wᵀ   →   token losses and, in place, d logits   →   d W += d logitsᵀ h (fp32)   →   d h = d logits W

and those behind the last one with a coefficient through the first product only. Where an earlier pass has found the
log-sum-exp, no product needs all logits of a row at once: then chunks have more rows, and some columns at a time.

The host starts the products, so it must know the lengths of the list's parts. It knows them without asking the device where the
caller gives them (from a batch on the CPU, or a share that is kept). Otherwise the two lengths are copied to the host in the
background, and read only after two more chunks of products are started: the device never runs idle. A count that the caller
gives too small cannot go wrong silently: the loss is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from attrs import Factory, frozen
from torch import Tensor

from wmtp.loss.cross_entropy import Answer, HeadLayout, Problem
from wmtp.loss.fp8 import SLOPE_FORMAT, SLOPE_RANGE, Rounded, multiply, round_table, round_to_fp8
from wmtp.loss.torch_backend.lists import Lengths, PredictionList, prediction_lists
from wmtp.loss.triton import kernels

__all__ = ["add_product", "chunk_rows", "compute", "scaled"]

_kernels: Any = kernels  # the decorator of Triton hides what it returns

# A chunk has as many bytes as the first says; with too few rows for that, as the second allows: products get slower below 2048
# rows, where few tiles are left for each multiprocessor, and small ones end before the host has started what follows.
_CHUNK_BYTES = 240 * 2**20
_LARGE_CHUNK_BYTES = 512 * 2**20
_FEW_ROWS = 2048

# rows · V · D of a chunk, below which the device is through with it before the host has started the next one
_BUSY = 1.7e11

# Rows of a chunk whose sums of exponentials are known; of its logits as many columns are made at once as _CHUNK_BYTES hold. The
# fp32 gradient of the unembedding is read and written once a chunk, that of the rows once a block of columns.
_KNOWN_ROWS = 8192


def chunk_rows(vocabulary: int, width: int, itemsize: int) -> int:
    """Number of rows of logits per chunk."""
    row = _stride(vocabulary, itemsize) * itemsize
    wanted = max(_FEW_ROWS, int(_BUSY / (vocabulary * width)))
    rows = max(_CHUNK_BYTES // row, min(wanted, _LARGE_CHUNK_BYTES // row), 1)
    # products of 2048 and 3072 rows fill the multiprocessors best
    step = next(step for step in (1024, 128, 1) if rows >= step)
    return rows - rows % step


def compute(problem: Problem) -> Answer:
    """See `Problem` and `Answer`."""
    positions, horizon = problem.ids.shape
    lists = prediction_lists(problem)
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
    lengths = Lengths(lists)
    for number, predictions in enumerate(lists):
        weight = state.cast[predictions.layout.weight]
        vocabulary, width = weight.shape
        ahead = chunk_rows(vocabulary, width, weight.element_size())
        rows = ahead if problem.lse is None or problem.fp8 is not None else _KNOWN_ROWS
        for start, stop, learned in lengths.chunks(number, rows, ahead):
            state.run(predictions, start, stop, learned)
    return Answer(
        losses=losses.T,
        lse=lse.T,
        entropy=None if state.entropies is None else state.entropies.clamp_(min=0.0).T,
        gradients=state.all_gradients(),
        broken=lengths.broken(),
    )


@frozen(kw_only=True, eq=False)
class _State:
    """Tensors that chunks read and write."""

    problem: Problem
    cast: dict[int, Tensor]
    losses: Tensor
    lse: Tensor
    entropies: Tensor | None
    gradients: list[Tensor | None]
    sums: dict[int, Tensor] = Factory(dict)
    buffers: dict[tuple[str, torch.dtype], Tensor] = Factory(dict)
    tables: dict[tuple[int, bool], Rounded] = Factory(dict)

    def run(self, predictions: PredictionList, start: int, stop: int, learned: bool) -> None:
        """Compute one chunk of a list."""
        problem, layout, places = self.problem, predictions.layout, predictions.places
        weight, count = self.cast[layout.weight], stop - start
        learns = any(problem.wants(place) for place in places)
        gradient = learned and (learns or problem.wants(layout.weight) or problem.wants(layout.bias))
        hidden = self._gather(predictions, start, stop)
        whole = problem.lse is None or problem.fp8 is not None
        columns = len(weight) if whole else _columns(count, len(weight), weight.element_size())
        new = {place: place not in self.sums for place in (layout.weight, layout.bias)}
        factors, rows = None, None
        for first in range(0, len(weight), columns):
            block = slice(first, min(first + columns, len(weight)))
            logits = self._logits(layout, hidden, block)
            factors = self._softmax(predictions, start, stop, logits, gradient, first)
            if not gradient:
                return
            if layout.bias is not None and problem.wants(layout.bias):
                total, found = self._sum(layout.bias)[block], logits.sum(0, dtype=torch.float32)
                total.copy_(found) if new[layout.bias] else total.add_(found)
            if problem.wants(layout.weight):
                if factors is not None:
                    _kernels.scale_kernel[(count,)](hidden, factors, hidden.shape[1], BLOCK=_width_block(hidden))
                add_product(self._sum(layout.weight)[block], logits.T, hidden, first=new[layout.weight])
            if learns and problem.fp8 is not None and problem.fp8.gradient:
                rows, factors = self._hidden_gradient_in_fp8(predictions, start, stop, logits, factors)
            elif learns:
                rows = self._hidden_gradient(rows, logits, weight[block], exact=factors is not None or columns < len(weight))
        if rows is not None:
            self._scatter(predictions, start, stop, rows, factors)

    def _gather(self, predictions: PredictionList, start: int, stop: int) -> Tensor:
        """Gather the hidden states of a chunk."""
        weight, count = self.cast[predictions.layout.weight], stop - start
        order, kind = predictions.order[start:stop], predictions.kind[start:stop]
        hidden = self._buffer("hidden", count, weight.shape[1], weight)
        for slot, place in enumerate(predictions.places):
            source = self.problem.tensors[place]
            source = source if source.stride(1) == 1 else source.contiguous()
            shape = slot, len(self.problem.ids), weight.shape[1]
            _kernels.gather_kernel[(count,)](source, source.stride(0), hidden, order, kind, *shape, BLOCK=_width_block(hidden))
        return hidden

    def _logits(self, layout: HeadLayout, hidden: Tensor, block: slice) -> Tensor:
        """Logits of a chunk for some of the vocabulary."""
        weight = self.cast[layout.weight][block]
        # rows that start at multiples of 128 bytes, whatever the vocabulary
        stride = _stride(len(weight), weight.element_size())
        whole = self._buffer("logits", len(hidden), stride, weight)
        logits = whole[:, : len(weight)]
        if (fp8 := self.problem.fp8) is not None:
            multiply(round_to_fp8(hidden), self._table(layout), whole, fast=fp8.fast, emulate=fp8.emulate)
            return logits if layout.bias is None else logits.add_(self.cast[layout.bias])
        if layout.bias is None:
            return torch.mm(hidden, weight.T, out=logits)
        return torch.addmm(self.cast[layout.bias][block], hidden, weight.T, out=logits)

    def _scatter(self, predictions: PredictionList, start: int, stop: int, rows: Tensor, factors: Tensor | None) -> None:
        """Bring the gradients of a chunk's hidden states to their places."""
        order, kind = predictions.order[start:stop], predictions.kind[start:stop]
        for slot, place in enumerate(predictions.places):
            to = self.gradients[place]
            if to is not None:
                shape = slot, len(self.problem.ids), rows.shape[1]
                form = {"SCALE": factors is not None, "BLOCK": _width_block(rows)}
                _kernels.scatter_kernel[(stop - start,)](rows, factors, to, order, kind, *shape, **form)

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

    def _softmax(
        self, predictions: PredictionList, start: int, stop: int, logits: Tensor, gradient: bool, first: int
    ) -> Tensor | None:
        """Compute token losses and turn logits into their gradient, in place.

        The gradient is divided by the factors ``[rows]``, if there are any.

        ``first`` is the token of the first column; there are all columns, unless the sums of exponentials are known.
        """
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
            given = predictions.coefficients[part], lse, first
            _kernels.gradient_kernel[grid](*rows, *given, **form, **_blocks(logits, 16384))
        return None

    def _hidden_gradient(self, rows: Tensor | None, delta: Tensor, weight: Tensor, *, exact: bool) -> Tensor:
        """Compute ``rows + delta · weight``.

        In fp32 where it is added to or scaled before it is rounded.
        """
        first = rows is None
        if rows is None:
            rows = self._buffer("gradient", len(delta), weight.shape[1], self.losses if exact else weight)
        add_product(rows, delta, weight, first=first)
        return rows

    def _hidden_gradient_in_fp8(
        self, predictions: PredictionList, start: int, stop: int, delta: Tensor, factors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute ``delta · weight`` by unit rows, and the rows' factors."""
        fp8, layout = self.problem.fp8, predictions.layout
        assert fp8 is not None, "asked for by it"
        scales = predictions.coefficients[start:stop] * layout.scale
        up = torch.where(scales != 0, SLOPE_RANGE / scales, 0.0)
        if factors is not None:
            up = up * factors
        table = self._table(layout, transposed=True)
        width = table.data.shape[1]
        slopes = self._buffer("slopes", len(delta), width, torch.empty(0, dtype=SLOPE_FORMAT, device=delta.device))
        _kernels.round_kernel[(len(delta),)](delta, delta.stride(0), delta.shape[1], up, slopes, width, **_blocks(delta))
        rows = self._buffer("gradient", len(delta), len(table.data), delta)
        left = Rounded(data=slopes, scale=torch.full((), 1 / SLOPE_RANGE, device=delta.device))
        return multiply(left, table, rows, fast=False, emulate=fp8.emulate), scales

    def _table(self, layout: HeadLayout, *, transposed: bool = False) -> Rounded:
        """Round a head's unembedding, once.

        ``[V, D]`` with V filled up, or ``[D, V]``.
        """
        key = layout.weight, transposed
        if key not in self.tables:
            if transposed:
                plain = self._table(layout)
                self.tables[key] = Rounded(data=plain.data.T.contiguous(), scale=plain.scale)
            else:
                weight = self.cast[layout.weight]
                rows = _stride(len(weight), weight.element_size())
                self.tables[key] = round_table(weight, rows, centered=layout.softcap is None)
        return self.tables[key]

    def _sum(self, place: int) -> Tensor:
        """Return an unembedding's or bias's gradient sum, in fp32.

        It holds no numbers before the first chunk.
        """
        if place not in self.sums:
            self.sums[place] = torch.empty_like(self.problem.tensors[place], dtype=torch.float32)
        return self.sums[place]

    def _buffer(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """One piece of memory for all chunks."""
        key = name, like.dtype
        kept = self.buffers.get(key)
        if kept is None or len(kept) < rows * columns:
            kept = self.buffers[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return kept[: rows * columns].view(rows, columns)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, may_change: bool) -> Tensor:
    """Compute ``gradient · factor`` in a precision.

    In place where that is allowed and possible.
    """
    same = may_change and gradient.dtype == dtype
    out = gradient if same else torch.empty_like(gradient, dtype=dtype)
    if gradient.numel() > 0:
        block = 4096
        grid = (triton.cdiv(gradient.numel(), block),)
        _kernels.finish_kernel[grid](gradient, out, factor, gradient.numel(), SAME=same, BLOCK=block)
    return out


def _adds_in_fp32(operand: Tensor) -> bool:
    """Return True if products of such operands can be written in fp32."""
    half = operand.dtype in (torch.bfloat16, torch.float16)
    return half and operand.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(operand.device)[0] >= 8


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add ``left · right`` to ``total``.

    With ``first``, ``total`` is taken as 0. The sum is in fp32, within the product where the library can.
    """
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right)
    elif _adds_in_fp32(left):
        if first:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


def _columns(rows: int, vocabulary: int, itemsize: int) -> int:
    """Number of vocabulary columns per product for ``rows`` rows with known log-sum-exp."""
    most = max(_CHUNK_BYTES // (rows * itemsize), 1)
    if most >= vocabulary:
        return vocabulary
    return most - most % 128 if most >= 128 else most


def _width_block(rows: Tensor) -> int:
    return min(triton.next_power_of_2(rows.shape[1]), 4096)


def _stride(vocabulary: int, itemsize: int) -> int:
    """Compute the row length of logits: V rounded up to 128 bytes."""
    step = 128 // itemsize
    return -(-vocabulary // step) * step


def _blocks(logits: Tensor, largest: int = 8192) -> dict[str, int]:
    """Block size and warps of the row kernels; measured, see docs/performance.md."""
    block = min(triton.next_power_of_2(logits.shape[1]), largest)
    return {"BLOCK": block, "num_warps": max(block // 1024, 1)}


def _top_entropy(logits: Tensor, layout: HeadLayout, top_k: int) -> Tensor:
    """Of each row, over its most probable tokens."""
    top = logits.topk(min(top_k, logits.shape[1]), sorted=False).values.float() * layout.scale
    if layout.softcap is not None:
        top = torch.tanh(top / layout.softcap) * layout.softcap
    return torch.special.entr(top.softmax(dim=1)).sum(dim=1)

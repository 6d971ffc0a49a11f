"""The Triton kernels of the loss: everything between its matrix products, each in one pass over device memory.

The products work on a *list* of predictions: ``order[i]`` says which prediction, ``slot · N + position``, stands in row i,
where slot counts the heads that share an unembedding. ``kind[i]`` says what it is: 0 has a coefficient, 1 is only measured,
2 is padding.
"""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001, ANN202
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gather_kernel", "scatter_kernel", "softmax_kernel"]

_COEFFICIENT = tl.constexpr(0)
_PADDING = tl.constexpr(2)


@triton.jit
def gather_kernel(hidden, stride, rows, order, kind, slot, positions, width, BLOCK: tl.constexpr) -> None:
    """``rows[i] = hidden[order[i]]`` for the predictions of one head; 0 for padding, which may hold NaN, and NaN · 0 is NaN."""
    row = tl.program_id(0).to(tl.int64)
    prediction = tl.load(order + row)
    if prediction // positions == slot:
        read = tl.where(tl.load(kind + row) == _PADDING, 0, width)
        source = hidden + (prediction % positions) * stride
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            values = tl.load(source + columns, mask=columns < read, other=0.0)
            tl.store(rows + row * width + columns, values.to(rows.dtype.element_ty), mask=columns < width)


@triton.jit
def scatter_kernel(rows, gradient, order, kind, slot, positions, width, BLOCK: tl.constexpr) -> None:
    """``gradient[order[i]] = rows[i]`` for the predictions of one head that have a coefficient."""
    row = tl.program_id(0).to(tl.int64)
    prediction = tl.load(order + row)
    if (prediction // positions == slot) & (tl.load(kind + row) == _COEFFICIENT):
        target = gradient + (prediction % positions) * width
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            values = tl.load(rows + row * width + columns, mask=inside)
            tl.store(target + columns, values.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _transform(logits, scale, softcap, SOFTCAP: tl.constexpr):
    z = logits.to(tl.float32) * scale
    if SOFTCAP:
        z = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / softcap)))  # tanh
    return z


@triton.jit
def _delta(z, probability, columns, target, coefficient, scale, softcap, SOFTCAP: tl.constexpr):
    # d CE / d logits = softmax − onehot
    delta = (probability - tl.where(columns == target, 1.0, 0.0)) * (coefficient * scale)
    if SOFTCAP:
        delta *= 1.0 - (z / softcap) * (z / softcap)
    return delta


@triton.jit
def softmax_kernel(
    logits,
    stride,
    vocabulary,
    order,
    kind,
    targets,
    coefficients,
    losses,
    lses,
    entropies,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    KNOWN: tl.constexpr,
    ENTROPY: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row of logits: its token loss, the logarithm of the sum of its exponentials, and, in place, its gradient.

    ``GRADIENT``: the logits become the gradient. ``KNOWN``: lses are given, and no losses are written. ``ENTROPY``: the
    entropy is written too. ``WHOLE``: a block holds the whole row, which is then read once.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    prediction = tl.load(order + row)
    group = tl.load(kind + row)
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    lse = 0.0
    total = 1.0
    z = tl.zeros((BLOCK,), tl.float32)
    e = z
    if group != _PADDING:
        if KNOWN:
            lse = tl.load(lses + prediction)
        else:
            # a target outside the vocabulary makes the loss NaN
            possible = tl.where(target < 0, vocabulary, target) < vocabulary
            z_target = _transform(tl.load(logits + target, mask=possible, other=float("nan")), scale, softcap, SOFTCAP)
            if WHOLE:
                inside = columns < vocabulary
                z = _transform(tl.load(logits + columns, mask=inside, other=0.0), scale, softcap, SOFTCAP)
                z = tl.where(inside, z, -float("inf"))
                top = tl.max(z, axis=0)
                e = tl.exp(z - top)
                total = tl.sum(e, axis=0)
                if ENTROPY:
                    moment = tl.sum(tl.where(e > 0.0, e * (z - top), 0.0), axis=0)
            else:
                top = -float("inf")
                total = 0.0
                moment = 0.0  # Σ exp(z − top) · (z − top)
                for start in range(0, vocabulary, BLOCK):
                    inside = start + columns < vocabulary
                    z = _transform(tl.load(logits + start + columns, mask=inside, other=0.0), scale, softcap, SOFTCAP)
                    z = tl.where(inside, z, -float("inf"))
                    new = tl.maximum(top, tl.max(z, axis=0))
                    e = tl.exp(z - new)
                    if ENTROPY:
                        moved = tl.where(total > 0.0, total * (top - new), 0.0)
                        moment = (moment + moved) * tl.exp(top - new)
                        moment += tl.sum(tl.where(e > 0.0, e * (z - new), 0.0), axis=0)
                    total = total * tl.exp(top - new) + tl.sum(e, axis=0)
                    top = new
            lse = top + tl.log(total)
            tl.store(losses + prediction, lse - z_target)
            tl.store(lses + prediction, lse)
            if ENTROPY:
                tl.store(entropies + prediction, tl.log(total) - moment / total)
    if GRADIENT:
        coefficient = tl.load(coefficients + row)
        if WHOLE:
            delta = _delta(z, e * (1.0 / total), columns, target, coefficient, scale, softcap, SOFTCAP)
            delta = tl.where(group == _COEFFICIENT, delta, 0.0)
            tl.store(logits + columns, delta.to(logits.dtype.element_ty), mask=columns < vocabulary)
        else:
            read = tl.where(group == _COEFFICIENT, vocabulary, 0)
            for start in range(0, vocabulary, BLOCK):
                at = start + columns
                z = _transform(tl.load(logits + at, mask=at < read, other=0.0), scale, softcap, SOFTCAP)
                delta = _delta(z, tl.exp(z - lse), at, target, coefficient, scale, softcap, SOFTCAP)
                delta = tl.where(group == _COEFFICIENT, delta, 0.0)
                tl.store(logits + at, delta.to(logits.dtype.element_ty), mask=at < vocabulary)

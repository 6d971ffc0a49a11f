"""Triton kernels of the loss: all between its products.

Each makes one pass over memory.

The products work on a *list* of predictions: row i holds prediction ``order[i]``, which is ``slot · N + position``; slot counts
the heads that share an unembedding. ``kind[i]`` is 0 for a prediction with a coefficient, 1 for one that is only measured, 2
for padding.
"""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001, ANN202
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "finish_kernel",
    "gather_kernel",
    "gradient_kernel",
    "measure_kernel",
    "round_kernel",
    "scale_kernel",
    "scatter_kernel",
    "single_pass_kernel",
]

_COEFFICIENT = tl.constexpr(0)
_PADDING = tl.constexpr(2)

# how far a logit may stand above the reference that exponentials are written relative to: exp(30) is 1e13
_HEADROOM = tl.constexpr(30.0)

# a sum of exponentials above this may have lost some
_LARGEST = tl.constexpr(1e30)


@triton.jit
def gather_kernel(hidden, stride, rows, order, kind, slot, positions, width, BLOCK: tl.constexpr) -> None:
    """Gather one head's predictions: ``rows[i] = hidden[order[i]]``.

    Rows are 0 for padding, which may hold NaN, and NaN · 0 is NaN.
    """
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
def scale_kernel(rows, factors, width, BLOCK: tl.constexpr) -> None:
    """``rows[i] *= factors[i]``."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(rows + row * width + columns, mask=columns < width).to(tl.float32) * factor
        tl.store(rows + row * width + columns, values.to(rows.dtype.element_ty), mask=columns < width)


@triton.jit
def round_kernel(logits, stride, vocabulary, factors, out, width, BLOCK: tl.constexpr) -> None:
    """Round to fp8: ``out[i] = logits[i] · factors[i]``.

    0 where the factor is, and behind the vocabulary up to ``width``.
    """
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row)
    read = tl.where(factor == 0.0, 0, vocabulary)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + columns, mask=columns < read, other=0.0).to(tl.float32) * factor
        tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def finish_kernel(source, out, factor, size, SAME: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Compute ``out = source · factor``.

    With ``SAME`` they are one tensor, and a factor of 1 leaves it alone.
    """
    scale = tl.load(factor).to(tl.float32)
    if (not SAME) | (scale != 1.0):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(source + at, mask=at < size).to(tl.float32) * scale
        tl.store(out + at, values.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def scatter_kernel(
    rows, factors, gradient, order, kind, slot, positions, width, SCALE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Scatter gradients: ``gradient[order[i]] = rows[i] (· factors[i])``.

    For the predictions of one head that have a coefficient.
    """
    row = tl.program_id(0).to(tl.int64)
    prediction = tl.load(order + row)
    if (prediction // positions == slot) & (tl.load(kind + row) == _COEFFICIENT):
        target = gradient + (prediction % positions) * width
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            values = tl.load(rows + row * width + columns, mask=inside)
            if SCALE:
                values = values.to(tl.float32) * tl.load(factors + row)
            tl.store(target + columns, values.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _transform(logits, scale, softcap, SOFTCAP: tl.constexpr):
    z = logits.to(tl.float32) * scale
    if SOFTCAP:
        z = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / softcap)))  # tanh
    return z


@triton.jit
def _block(logits, start, vocabulary, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Some logits of a row, −∞ behind its end."""
    columns = start + tl.arange(0, BLOCK)
    z = _transform(tl.load(logits + columns, mask=columns < vocabulary, other=0.0), scale, softcap, SOFTCAP)
    return tl.where(columns < vocabulary, z, -float("inf"))


@triton.jit
def _target_logit(logits, target, vocabulary, scale, softcap, SOFTCAP: tl.constexpr):
    """A target outside the vocabulary makes the loss NaN."""
    possible = tl.where(target < 0, vocabulary, target) < vocabulary
    return _transform(tl.load(logits + target, mask=possible, other=float("nan")), scale, softcap, SOFTCAP)


@triton.jit
def measure_kernel(
    logits,
    stride,
    vocabulary,
    order,
    kind,
    targets,
    losses,
    lses,
    entropies,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute token loss and log-sum-exp of one row of logits.

    With ``ENTROPY``, its entropy too.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    if tl.load(kind + row) != _PADDING:
        prediction = tl.load(order + row)
        z_target = _target_logit(logits, tl.load(targets + row), vocabulary, scale, softcap, SOFTCAP)
        # relative to the highest logit of the first block, each lane adds up for itself
        z = _block(logits, 0, vocabulary, scale, softcap, SOFTCAP, BLOCK)
        top = tl.max(z, axis=0)
        sums = tl.exp(z - top)
        moments = tl.where(sums > 0.0, sums * (z - top), 0.0)  # Σ exp(z − top) · (z − top)
        for start in range(BLOCK, vocabulary, BLOCK):
            z = _block(logits, start, vocabulary, scale, softcap, SOFTCAP, BLOCK)
            e = tl.exp(z - top)
            sums += e
            if ENTROPY:
                moments += tl.where(e > 0.0, e * (z - top), 0.0)
        total = tl.sum(sums, axis=0)
        moment = tl.sum(moments, axis=0)
        if (total < _LARGEST) == 0:
            # a later logit is so much larger that its exponential overflows: then relative to the largest of all
            top = -float("inf")
            for start in range(0, vocabulary, BLOCK):
                top = tl.maximum(top, tl.max(_block(logits, start, vocabulary, scale, softcap, SOFTCAP, BLOCK), axis=0))
            total = 0.0
            moment = 0.0
            for start in range(0, vocabulary, BLOCK):
                z = _block(logits, start, vocabulary, scale, softcap, SOFTCAP, BLOCK)
                e = tl.exp(z - top)
                total += tl.sum(e, axis=0)
                if ENTROPY:
                    moment += tl.sum(tl.where(e > 0.0, e * (z - top), 0.0), axis=0)
        lse = top + tl.log(total)
        tl.store(losses + prediction, lse - z_target)
        tl.store(lses + prediction, lse)
        if ENTROPY:
            tl.store(entropies + prediction, tl.log(total) - moment / total)


@triton.jit
def gradient_kernel(
    logits,
    stride,
    vocabulary,
    order,
    kind,
    targets,
    coefficients,
    lses,
    first,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Turn one row of logits into its gradient, in place.

    c · (softmax − onehot); 0 where there is no coefficient.

    The row may be a part of the vocabulary, which begins with the token ``first``.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    counts = tl.load(kind + row) == _COEFFICIENT
    target = tl.load(targets + row) - first
    coefficient = tl.load(coefficients + row)
    lse = tl.load(lses + tl.load(order + row))
    read = tl.where(counts, vocabulary, 0)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _transform(tl.load(logits + columns, mask=columns < read, other=0.0), scale, softcap, SOFTCAP)
        delta = (tl.exp(z - lse) - tl.where(columns == target, 1.0, 0.0)) * (coefficient * scale)
        if SOFTCAP:
            delta *= 1.0 - (z / softcap) * (z / softcap)
        delta = tl.where(counts, delta, 0.0)
        tl.store(logits + columns, delta.to(logits.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def single_pass_kernel(
    logits,
    stride,
    vocabulary,
    order,
    kind,
    targets,
    coefficients,
    factors,
    losses,
    lses,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Measure a row of logits and differentiate it, in one pass.

    The logits become a multiple of their gradient, and ``factors`` say which.

    With s = Σ exp(z − r) for a reference r, the gradient c · (softmax − onehot) is (c / s) · (exp(z − r) − s · onehot). What is
    in brackets can be written before s is known, but for the target's own place, and the factor c / s goes into the products'
    other operand. The reference is the highest logit of the first block. Where a later one stands far above it, what was
    written is scaled down to the new reference: seldom, and in any case right.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    group = tl.load(kind + row)
    counts = group == _COEFFICIENT
    target = tl.load(targets + row)
    z_target = 0.0
    reference = -float("inf")
    sums = tl.zeros((BLOCK,), tl.float32)
    if group != _PADDING:
        z_target = _target_logit(logits, target, vocabulary, scale, softcap, SOFTCAP)
    read = tl.where(group == _PADDING, 0, vocabulary)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _transform(tl.load(logits + columns, mask=columns < read, other=0.0), scale, softcap, SOFTCAP)
        z = tl.where(columns < vocabulary, z, -float("inf"))
        high = tl.max(z, axis=0)
        if high > reference + _HEADROOM:
            shrink = tl.exp(reference - high)
            tl.debug_barrier()  # what is read here may have been written by other threads
            for earlier in range(0, start, BLOCK):
                before = earlier + tl.arange(0, BLOCK)
                written = tl.load(logits + before).to(tl.float32) * shrink
                tl.store(logits + before, written.to(logits.dtype.element_ty))
            sums *= shrink
            reference = high
        e = tl.exp(z - reference)
        sums += e
        if SOFTCAP:
            e *= 1.0 - (z / softcap) * (z / softcap)
        e = tl.where(counts, e, 0.0)
        tl.store(logits + columns, e.to(logits.dtype.element_ty), mask=columns < vocabulary)
    total = tl.sum(sums, axis=0)
    if group != _PADDING:
        prediction = tl.load(order + row)
        lse = reference + tl.log(total)
        tl.store(losses + prediction, lse - z_target)
        tl.store(lses + prediction, lse)
    tl.debug_barrier()  # the target's place is written a second time, by another thread
    at_target = tl.exp(z_target - reference) - total
    if SOFTCAP:
        at_target *= 1.0 - (z_target / softcap) * (z_target / softcap)
    fits = tl.where(target < 0, vocabulary, target) < tl.where(counts, vocabulary, 0)
    tl.store(logits + target, at_target.to(logits.dtype.element_ty), mask=fits)
    tl.store(factors + row, tl.where(counts, tl.load(coefficients + row) * scale / total, 0.0))

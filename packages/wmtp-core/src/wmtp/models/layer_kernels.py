"""Triton kernels of a decoder layer for few tokens.

They are five, where compiled code has twelve or thirteen.

A step of decoding is bound by how long its kernels wait for one another. So each does as much as it can without a sum over the
whole layer: norm, queries, keys and values, rotation and the cache; attention; its output; the gate; the sum.
"""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from wmtp.models.product_kernels import eager, early, let_begin, product, rows_of, scale_of, shape_of, tiles_of, wait

__all__ = ["Norm", "attend", "gate", "multiply", "project"]

#: weight ``[K]`` and epsilon of an RMS norm
Norm = tuple[Tensor, float]

#: slots of the cache that attention looks at before it waits, and warps
_BLOCK: Final = 256
_ATTENDING: Final = 8


@triton.jit
def _project_kernel(
    x, norm, queries_weight, keys_weight, values_weight, cos, sin, slots, query, keys, values, eps,
    cache_row, cache_head, TOKENS: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, SHARED: tl.constexpr, OUTPUTS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Norm, queries, keys and values, rotated, and into the cache.

    A program has some numbers of the first half of a head, and those of the second half that are rotated with them.
    """
    HALF: tl.constexpr = D // 2
    PIECES: tl.constexpr = (K + WIDE - 1) // WIDE
    blocks = HALF // OUTPUTS
    head = tl.program_id(0) // blocks
    place = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    if head < HEADS:
        weight = queries_weight + head * D * K
    elif head < HEADS + SHARED:
        weight = keys_weight + (head - HEADS) * D * K
    else:
        weight = values_weight + (head - HEADS - SHARED) * D * K
    first = tiles_of(weight, place, norm, K, K, WIDE, True)
    second = tiles_of(weight, place + HALF, norm, K, K, WIDE, True)
    wait(EARLY)
    # what attention reads before it waits is written by now
    let_begin(EARLY)
    row = tl.arange(0, PADDED)
    there = (row < ROWS)[:, None]
    given = rows_of(x, ROWS, PADDED, K, WIDE)
    angle = row[:, None] * D + place[None, :]
    cos_one = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
    sin_one = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
    cos_other = tl.load(cos + angle + HALF, mask=there, other=0.0).to(tl.float32)
    sin_other = tl.load(sin + angle + HALF, mask=there, other=0.0).to(tl.float32)
    slot = tl.load(slots + row, mask=row < ROWS, other=0)
    scale = scale_of(given, eps, PADDED, K, PIECES, WIDE)
    one = product(given, first, PADDED, OUTPUTS, PIECES, WIDE) * scale
    other = product(given, second, PADDED, OUTPUTS, PIECES, WIDE) * scale
    if head < HEADS + SHARED:
        turned = one * cos_one - other * sin_one
        other = other * cos_other + one * sin_other
        one = turned
    cached = row // TOKENS * cache_row + slot * D
    if head < HEADS:
        into = query + ((row * HEADS + head) * D).to(tl.int64)
    elif head < HEADS + SHARED:
        into = keys + (cached + (head - HEADS) * cache_head).to(tl.int64)
    else:
        into = values + (cached + (head - HEADS - SHARED) * cache_head).to(tl.int64)
    tl.store(into[:, None] + place[None, :], one.to(query.dtype.element_ty), mask=there)
    tl.store(into[:, None] + HALF + place[None, :], other.to(query.dtype.element_ty), mask=there)


@triton.jit
def _attend_kernel(
    query, keys, values, mask, slots, out, scale, cache_row, cache_head, mask_row, mask_token,
    TOKENS: tl.constexpr, NEW: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr, EAGER: tl.constexpr,
) -> None:  # fmt: skip
    """Attention of one query, with a running softmax.

    The slots before the tokens of this step were written by steps before: they are read while the queries are made.
    """
    let_begin(EAGER)
    head, row = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    batch, token = row // TOKENS, row % TOKENS
    d, place = tl.arange(0, D)[None, :], tl.arange(0, BLOCK)
    begin = tl.load(slots + batch * TOKENS).to(tl.int32)
    end = tl.load(slots + row).to(tl.int32) + 1
    cached = batch * cache_row + head // GROUPS * cache_head
    masked = mask + batch * mask_row + token * mask_token
    there = place < begin
    inside = cached + place[:, None] * D + d
    key = tl.load(keys + inside, mask=there[:, None], other=0.0).to(tl.float32)
    value = tl.load(values + inside, mask=there[:, None], other=0.0).to(tl.float32)
    added = tl.load(masked + place, mask=there, other=-float("inf")).to(tl.float32)
    new = begin + tl.arange(0, NEW)
    new_there = new < end
    new_added = tl.load(masked + new, mask=new_there, other=-float("inf")).to(tl.float32)
    wait(EARLY)
    if not EAGER:
        let_begin(EARLY)
    asked = tl.load(query + (row * HEADS + head) * D + d).to(tl.float32) * scale
    new_inside = cached + new[:, None] * D + d
    new_key = tl.load(keys + new_inside, mask=new_there[:, None], other=0.0).to(tl.float32)
    new_value = tl.load(values + new_inside, mask=new_there[:, None], other=0.0).to(tl.float32)
    # a query that sees nothing, as padding, gets some finite result
    scores = tl.where(there, tl.maximum(tl.sum(key * asked, axis=1) + added, -3.0e38), -float("inf"))
    new_scores = tl.where(new_there, tl.maximum(tl.sum(new_key * asked, axis=1) + new_added, -3.0e38), -float("inf"))
    largest = tl.maximum(tl.max(scores, axis=0), tl.max(new_scores, axis=0))
    weights, new_weights = tl.exp(scores - largest), tl.exp(new_scores - largest)
    total = tl.sum(weights, axis=0) + tl.sum(new_weights, axis=0)
    sums = tl.sum(value * weights[:, None], axis=0) + tl.sum(new_value * new_weights[:, None], axis=0)
    for first in range(BLOCK, begin, BLOCK):
        more = first + place
        more_there = more < begin
        more_inside = cached + more[:, None] * D + d
        more_key = tl.load(keys + more_inside, mask=more_there[:, None], other=0.0).to(tl.float32)
        more_value = tl.load(values + more_inside, mask=more_there[:, None], other=0.0).to(tl.float32)
        more_added = tl.load(masked + more, mask=more_there, other=-float("inf")).to(tl.float32)
        more_scores = tl.maximum(tl.sum(more_key * asked, axis=1) + more_added, -3.0e38)
        more_scores = tl.where(more_there, more_scores, -float("inf"))
        now = tl.maximum(largest, tl.max(more_scores, axis=0))
        more_weights = tl.exp(more_scores - now)
        fading = tl.exp(largest - now)
        total = total * fading + tl.sum(more_weights, axis=0)
        sums = sums * fading + tl.sum(more_value * more_weights[:, None], axis=0)
        largest = now
    tl.store(out + (row * HEADS + head) * D + tl.arange(0, D), (sums / total).to(out.dtype.element_ty))


@triton.jit
def _gate_kernel(
    x, norm, gate, up, out, N, eps, ROWS: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr,
    WIDE: tl.constexpr, EARLY: tl.constexpr, EAGER: tl.constexpr,
) -> None:  # fmt: skip
    """Norm, and ``silu(x gate') * (x up')``."""
    PIECES: tl.constexpr = (K + WIDE - 1) // WIDE
    let_begin(EAGER)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tiles_of(gate, n, norm, K, K, WIDE, True)
    second = tiles_of(up, n, norm, K, K, WIDE, True)
    wait(EARLY)
    if not EAGER:
        let_begin(EARLY)
    given = rows_of(x, ROWS, PADDED, K, WIDE)
    scale = scale_of(given, eps, PADDED, K, PIECES, WIDE)
    left = product(given, first, PADDED, OUTPUTS, PIECES, WIDE) * scale
    right = product(given, second, PADDED, OUTPUTS, PIECES, WIDE) * scale
    row = tl.arange(0, PADDED)[:, None]
    tl.store(out + row * N + n[None, :], (left * tl.sigmoid(left) * right).to(out.dtype.element_ty), mask=row < ROWS)


@triton.jit
def _multiply_kernel(
    x, weight, residual, out, N, ROWS: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr,
    WIDE: tl.constexpr, EARLY: tl.constexpr, EAGER: tl.constexpr,
) -> None:  # fmt: skip
    """``residual + x weight'``."""
    PIECES: tl.constexpr = (K + WIDE - 1) // WIDE
    let_begin(EAGER)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tiles = tiles_of(weight, n, weight, K, K, WIDE, False)
    wait(EARLY)
    if not EAGER:
        let_begin(EARLY)
    row = tl.arange(0, PADDED)[:, None]
    place = row * N + n[None, :]
    before = tl.load(residual + place, mask=row < ROWS, other=0.0).to(tl.float32)
    given = rows_of(x, ROWS, PADDED, K, WIDE)
    result = before + product(given, tiles, PADDED, OUTPUTS, PIECES, WIDE)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=row < ROWS)


def project(
    x: Tensor, norm: Norm, weights: tuple[Tensor, Tensor, Tensor], turn: tuple[Tensor, Tensor], slots: Tensor,
    cache: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """Compute queries, and write keys and values into the cache.

    Args:
        x: ``[B, T, K]``, contiguous, before the norm.
        norm: before the products.
        weights: of queries ``[heads d, K]``, keys and values ``[shared heads d, K]``, contiguous.
        turn: cosines and sines of the positions, ``[B, T, d]``, contiguous.
        slots: ``[B, T]``, where keys and values are written.
        cache: keys and values, ``[B, shared heads, S, d]``, contiguous.

    Returns:
        ``[B, T, heads, d]``.
    """
    rows, tokens, width = x.shape
    keys, values = cache
    d, shared = keys.shape[-1], keys.shape[1]
    heads = weights[0].shape[0] // d
    query = x.new_empty(rows, tokens, heads, d)
    shape, options = shape_of("project", rows * tokens), early(x)
    kernel: Any = _project_kernel
    kernel[((heads + 2 * shared) * (d // 2 // shape["OUTPUTS"]),)](
        x, norm[0], *weights, *turn, slots, query, keys, values, norm[1], keys.stride(0), keys.stride(1), TOKENS=tokens,
        K=width, D=d, HEADS=heads, SHARED=shared, **shape, **options,
    )  # fmt: skip
    return query


def attend(query: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Attend to the cache.

    Args:
        query: ``[B, T, heads, d]``, contiguous.
        cache: see `project`.
        mask: ``[B, 1, T, ≤ S]``, added to the scores.
        slots: ``[B, T]``, contiguous, the queries' own, one after the other in each row; they see none behind it.
        scale: of the scores.

    Returns:
        ``[B, T, heads d]``.
    """
    rows, tokens, heads, d = query.shape
    keys, values = cache
    out = torch.empty_like(query)
    kernel: Any = _attend_kernel
    kernel[(rows * tokens * heads,)](
        query, keys, values, mask, slots, out, scale, keys.stride(0), keys.stride(1), mask.stride(0), mask.stride(2),
        TOKENS=tokens, NEW=triton.next_power_of_2(tokens), HEADS=heads, GROUPS=heads // keys.shape[1], D=d, BLOCK=_BLOCK,
        num_warps=_ATTENDING, **eager(query),
    )  # fmt: skip
    return out.flatten(2)


def gate(x: Tensor, norm: Norm, gate: Tensor, up: Tensor) -> Tensor:
    """Gate a norm's result.

    With ``y`` the RMS norm of ``[B, T, K]``, and weights ``[N, K]``: ``silu(y gate') * (y up')``.
    """
    out = x.new_empty(*x.shape[:-1], len(gate))
    shape = shape_of("gate", x.numel() // x.shape[-1])
    kernel: Any = _gate_kernel
    kernel[(len(gate) // shape["OUTPUTS"],)](x, norm[0], gate, up, out, len(gate), norm[1], K=x.shape[-1], **shape, **eager(x))
    return out


def multiply(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Return ``residual + x weight'`` of ``[B, T, K]`` and ``[N, K]``."""
    out = torch.empty_like(residual)
    part = "down" if x.shape[-1] > len(weight) else "out"
    shape, begins = shape_of(part, x.numel() // x.shape[-1]), eager(x, several=part == "out")
    kernel: Any = _multiply_kernel
    kernel[(len(weight) // shape["OUTPUTS"],)](x, weight, residual, out, len(weight), K=x.shape[-1], **shape, **begins)
    return out

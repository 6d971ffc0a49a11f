"""Triton kernels of a decoder layer for few tokens.

They are five, where compiled code has twelve or thirteen.

A step of decoding is bound by how long its kernels wait for one another. So each does as much as it can without a sum over the
whole layer: norm, queries, keys and values, rotation and the cache; attention; its output; the gate; the sum.

Starting a program takes 1.6 ns, so 1,536 take longer than what they compute. The gate's programs have four warps with two or
three rows of each weight, and a thread of a warp finishes one token's result: exponentials and writes once for all tokens.
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

from wmtp.models.product_kernels import (
    dot,
    eager,
    early,
    let_begin,
    product,
    rows_of,
    scale_of,
    shape_of,
    tiles_of,
    wait,
    whole_rows,
    whole_tokens,
)

__all__ = ["Norm", "gate", "multiply", "project"]

#: weight ``[K]`` and epsilon of an RMS norm
Norm = tuple[Tensor, float]

#: the gate's warps of a program, and columns that they read at a time: sizes are multiples of them
_WARPS: Final = 4
_WIDE: Final = 64

#: rows of a program where warps have parts of long rows, for two to five tokens: for one and six it is slower
_LONG: Final = {"EACH": 4, "WARPS": 2, "WIDE": 128}


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
def _gate_kernel(
    x, norm, gate, up, out, N, eps, ROWS: tl.constexpr, K: tl.constexpr, EACH: tl.constexpr, WARPS: tl.constexpr,
    WIDE: tl.constexpr, EARLY: tl.constexpr, EAGER: tl.constexpr,
) -> None:  # fmt: skip
    """Norm, and ``silu(x gate') * (x up')``."""
    PIECES: tl.constexpr = K // WIDE
    let_begin(EAGER)
    programs, warp = tl.num_programs(0), tl.arange(0, WARPS)
    first, second = (), ()
    for each in tl.static_range(EACH):
        n = (warp * EACH + each) * programs + tl.program_id(0)
        first = first + whole_rows(gate, n, norm, K, WIDE, True)
        second = second + whole_rows(up, n, norm, K, WIDE, True)
    wait(EARLY)
    if not EAGER:
        let_begin(EARLY)
    given = whole_tokens(x, ROWS, K, WARPS, WIDE)
    lane = tl.arange(0, 32)[:, None]
    left, right, squares = (
        tl.zeros([32, WARPS], tl.float32),
        tl.zeros([32, WARPS], tl.float32),
        tl.zeros([32, WARPS], tl.float32),
    )
    for token in tl.static_range(ROWS):
        squares = tl.where(lane % 8 == token, dot(given, token, given, token, PIECES), squares)
        for each in tl.static_range(EACH):
            left = tl.where(lane == each * 8 + token, dot(given, token, first, each, PIECES), left)
            right = tl.where(lane == each * 8 + token, dot(given, token, second, each, PIECES), right)
    scale = tl.rsqrt(squares / K + eps)
    left, right = left * scale, right * scale
    n = (warp[None, :] * EACH + lane // 8) * programs + tl.program_id(0)
    result = (left * tl.sigmoid(left) * right).to(out.dtype.element_ty)
    tl.store(out + lane % 8 * N + n, result, mask=(lane < EACH * 8) & (lane % 8 < ROWS))


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


@triton.jit
def _long_kernel(
    x, weight, residual, out, N, ROWS: tl.constexpr, K: tl.constexpr, EACH: tl.constexpr, WARPS: tl.constexpr,
    WIDE: tl.constexpr, EARLY: tl.constexpr, EAGER: tl.constexpr,
) -> None:  # fmt: skip
    """``residual + x weight'`` for long rows.

    Each warp has a part of each row; what the warps found for all rows and tokens is added up at once.
    """
    PIECES: tl.constexpr = K // (WIDE * WARPS)
    let_begin(EAGER)
    first = tl.program_id(0) * EACH
    k = tl.arange(0, WARPS)[None, :] * WIDE + tl.arange(0, WIDE)[:, None]
    tiles = ()
    for each in tl.static_range(EACH):
        for piece in tl.static_range(PIECES):
            tiles = tiles + (tl.load(weight + (first + each) * K + piece * (WIDE * WARPS) + k).to(tl.float32),)  # noqa: RUF005
    lane = tl.arange(0, 32)
    place, there = lane % 8 * N + first + lane // 8, (lane < EACH * 8) & (lane % 8 < ROWS)
    wait(EARLY)
    if not EAGER:
        let_begin(EARLY)
    given = ()
    for row in tl.static_range(ROWS):
        for piece in tl.static_range(PIECES):
            given = given + (tl.load(x + row * K + piece * (WIDE * WARPS) + k).to(tl.float32),)  # noqa: RUF005
    before = tl.load(residual + place, mask=there, other=0.0).to(tl.float32)
    sums = tl.zeros([32, WARPS], tl.float32)
    for token in tl.static_range(ROWS):
        for each in tl.static_range(EACH):
            sums = tl.where(lane[:, None] == each * 8 + token, dot(given, token, tiles, each, PIECES), sums)
    tl.store(out + place, (before + tl.sum(sums, axis=1)).to(out.dtype.element_ty), mask=there)


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


def gate(x: Tensor, norm: Norm, gate: Tensor, up: Tensor) -> Tensor:
    """Gate a norm's result.

    With ``y`` the RMS norm of ``[B, T, K]``, and weights ``[N, K]``: ``silu(y gate') * (y up')``.
    """
    out = x.new_empty(*x.shape[:-1], len(gate))
    shape, outputs = _warps_of(x.numel() // x.shape[-1], len(gate))
    kernel: Any = _gate_kernel
    kernel[(len(gate) // outputs,)](
        x, norm[0], gate, up, out, len(gate), norm[1], K=x.shape[-1], **shape, **eager(x)
    )  # fmt: skip
    return out


def multiply(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Return ``residual + x weight'`` of ``[B, T, K]`` and ``[N, K]``."""
    out = torch.empty_like(residual)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    long = width > len(weight)
    begins = eager(x, several=not long)
    kernel: Any = _multiply_kernel
    if long and 1 < rows < 6 and width % (_LONG["WIDE"] * _LONG["WARPS"]) == 0:
        kernel, shape, outputs = _long_kernel, {"ROWS": rows, **_LONG, "num_warps": _LONG["WARPS"]}, _LONG["EACH"]
    else:
        shape = shape_of("down" if long else "out", rows)
        outputs = shape["OUTPUTS"]
    kernel[(len(weight) // outputs,)](x, weight, residual, out, len(weight), K=width, **shape, **begins)
    return out


def _warps_of(rows: int, outputs: int) -> tuple[dict[str, int], int]:
    """Return the gate's options, and how many rows a program has."""
    each = 3 if rows == 1 and outputs % (3 * _WARPS) == 0 else 2
    return {"ROWS": rows, "EACH": each, "WARPS": _WARPS, "WIDE": _WIDE, "num_warps": _WARPS}, each * _WARPS

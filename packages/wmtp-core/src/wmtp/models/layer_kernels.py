"""Triton kernels of a decoder layer for few tokens.

They are five, where compiled code has twelve or thirteen.

A step of decoding is bound by how long its kernels wait for one another. So each does as much as it can without a sum over the
whole layer: norm, queries, keys and values, rotation and the cache; attention; its output; the gate; the sum. A program has one
or two warps and a few rows of the weight, which it holds in registers and uses for all tokens. Where the device can start a
kernel before the one before it has ended (from Hopper on), those are read while it waits.
"""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001, ANN202, RUF005 - nor does it know a starred tuple
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["Norm", "attend", "gate", "join", "multiply", "normalize", "project"]

#: weight ``[K]`` and epsilon of an RMS norm
Norm = tuple[Tensor, float]

#: columns of a weight that a program reads at a time
_WIDE: Final = 64

#: rows of a weight, or pairs of them, that a program multiplies
_OUTPUTS: Final = 2

#: the same for rows of more numbers than `_SHORT`, and warps
_LONG: Final = 1, 128, 1
_SHORT: Final = 1024

#: slots of the cache that attention looks at at a time
_BLOCK: Final = 128


@triton.jit
def _wait(EARLY: tl.constexpr) -> None:
    """Wait for the kernel before, then let the next one begin."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _tiles(weight, n, norm, STRIDE: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr):
    """Read columns of a weight's rows, scaled by the norm's weight."""
    k = tl.arange(0, WIDE)[None, :]
    tiles = ()
    for start in tl.static_range(0, K, WIDE):
        tile = tl.load(weight + n[:, None] * STRIDE + start + k).to(tl.float32)
        if NORM:
            tile = tile * tl.load(norm + start + k).to(tl.float32)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _product(x, tiles, eps, OUTPUTS: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr):
    """Multiply a row, or its RMS norm, by a weight's rows."""
    k = tl.arange(0, WIDE)[None, :]
    sums = tl.zeros([OUTPUTS, WIDE], tl.float32)
    squares = tl.zeros([1, WIDE], tl.float32)
    for piece in tl.static_range(K // WIDE):
        given = tl.load(x + piece * WIDE + k).to(tl.float32)
        if NORM:
            squares += given * given
        sums += tiles[piece] * given
    result = tl.sum(sums, axis=1)
    if NORM:
        result = result * tl.rsqrt(tl.sum(squares) / K + eps)
    return result


@triton.jit
def _two_products(x, first, second, eps, OUTPUTS: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """Multiply the RMS norm of a row by two sets of rows."""
    k = tl.arange(0, WIDE)[None, :]
    left = tl.zeros([OUTPUTS, WIDE], tl.float32)
    right = tl.zeros([OUTPUTS, WIDE], tl.float32)
    squares = tl.zeros([1, WIDE], tl.float32)
    for piece in tl.static_range(K // WIDE):
        given = tl.load(x + piece * WIDE + k).to(tl.float32)
        squares += given * given
        left += first[piece] * given
        right += second[piece] * given
    scale = tl.rsqrt(tl.sum(squares) / K + eps)
    return tl.sum(left, axis=1) * scale, tl.sum(right, axis=1) * scale


@triton.jit
def _project_kernel(
    x, norm, queries_weight, keys_weight, values_weight, cos, sin, slots, query, keys, values, eps,
    cache_row, cache_head, TOKENS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    SHARED: tl.constexpr, OUTPUTS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Norm, queries, keys and values, rotated, and into the cache.

    A program has some numbers of the first half of a head, and those of the second half that are rotated with them.
    """
    HALF: tl.constexpr = D // 2
    blocks = HALF // OUTPUTS
    head = tl.program_id(0) // blocks
    place = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    if head < HEADS:
        weight = queries_weight + head * D * K
    elif head < HEADS + SHARED:
        weight = keys_weight + (head - HEADS) * D * K
    else:
        weight = values_weight + (head - HEADS - SHARED) * D * K
    first = _tiles(weight, place, norm, K, K, WIDE, True)
    second = _tiles(weight, place + HALF, norm, K, K, WIDE, True)
    _wait(EARLY)
    for row in tl.static_range(ROWS):
        one, other = _two_products(x + row * K, first, second, eps, OUTPUTS, K, WIDE)
        if head < HEADS + SHARED:
            angle = row * D + place
            turned = one * tl.load(cos + angle).to(tl.float32) - other * tl.load(sin + angle).to(tl.float32)
            angle += HALF
            other = other * tl.load(cos + angle).to(tl.float32) + one * tl.load(sin + angle).to(tl.float32)
            one = turned
        if head < HEADS:
            into = query + (row * HEADS + head) * D
        else:
            cached = row // TOKENS * cache_row + tl.load(slots + row) * D
            if head < HEADS + SHARED:
                into = keys + cached + (head - HEADS) * cache_head
            else:
                into = values + cached + (head - HEADS - SHARED) * cache_head
        tl.store(into + place, one.to(query.dtype.element_ty))
        tl.store(into + HALF + place, other.to(query.dtype.element_ty))


@triton.jit
def _attend_kernel(
    query, keys, values, mask, slots, out, scale, cache_row, cache_head, mask_row, mask_token,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Attention of one query, with a running softmax."""
    head, row = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    batch, token = row // TOKENS, row % TOKENS
    d, place = tl.arange(0, D)[None, :], tl.arange(0, BLOCK)
    _wait(EARLY)
    end = tl.load(slots + row) + 1
    asked = tl.load(query + (row * HEADS + head) * D + d).to(tl.float32) * scale
    cached = batch * cache_row + head // GROUPS * cache_head
    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, D], tl.float32)
    for first in range(0, end, BLOCK):
        slot = first + place
        there = slot < end
        inside = cached + slot[:, None] * D + d
        key = tl.load(keys + inside, mask=there[:, None], other=0.0).to(tl.float32)
        value = tl.load(values + inside, mask=there[:, None], other=0.0).to(tl.float32)
        added = tl.load(mask + batch * mask_row + token * mask_token + slot, mask=there, other=-float("inf")).to(tl.float32)
        # a query that sees nothing, as padding, gets some finite result
        scores = tl.where(there, tl.maximum(tl.sum(key * asked, axis=1) + added, -3.0e38), -float("inf"))
        now = tl.maximum(largest, tl.max(scores, axis=0))
        weights = tl.exp(scores - now)
        fading = tl.exp(largest - now)
        total = total * fading + tl.sum(weights, axis=0)
        sums = sums * fading[:, None] + tl.sum(value * weights[:, None], axis=0)[None, :]
        largest = now
    tl.store(out + (row * HEADS + head) * D + d, (sums / total[:, None]).to(out.dtype.element_ty))


@triton.jit
def _gate_kernel(
    x, norm, gate, up, out, N, eps, ROWS: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Norm, and ``silu(x gate') * (x up')``."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = _tiles(gate, n, norm, K, K, WIDE, True)
    second = _tiles(up, n, norm, K, K, WIDE, True)
    _wait(EARLY)
    for row in tl.static_range(ROWS):
        left, right = _two_products(x + row * K, first, second, eps, OUTPUTS, K, WIDE)
        tl.store(out + row * N + n, (left * tl.sigmoid(left) * right).to(out.dtype.element_ty))


@triton.jit
def _multiply_kernel(
    x, weight, residual, out, N, ROWS: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """``residual + x weight'``."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tiles = _tiles(weight, n, weight, K, K, WIDE, False)
    _wait(EARLY)
    for row in tl.static_range(ROWS):
        result = _product(x + row * K, tiles, 0.0, OUTPUTS, K, WIDE, False)
        result += tl.load(residual + row * N + n).to(tl.float32)
        tl.store(out + row * N + n, result.to(out.dtype.element_ty))


@triton.jit
def _join_kernel(
    left, left_norm, left_eps, right, right_norm, right_eps, weight, out, N, ROWS: tl.constexpr, K: tl.constexpr,
    OUTPUTS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """``[norm(left); norm(right)] weight'``."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = _tiles(weight, n, left_norm, 2 * K, K, WIDE, True)
    second = _tiles(weight + K, n, right_norm, 2 * K, K, WIDE, True)
    _wait(EARLY)
    for row in tl.static_range(ROWS):
        result = _product(left + row * K, first, left_eps, OUTPUTS, K, WIDE, True)
        result += _product(right + row * K, second, right_eps, OUTPUTS, K, WIDE, True)
        tl.store(out + row * N + n, result.to(out.dtype.element_ty))


@triton.jit
def _norm_kernel(x, norm, out, eps, K: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr) -> None:
    """RMS norm of one row."""
    k = tl.arange(0, PADDED)
    scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    _wait(EARLY)
    row = tl.program_id(0) * K + k
    given = tl.load(x + row, mask=k < K, other=0.0).to(tl.float32)
    result = given * tl.rsqrt(tl.sum(given * given) / K + eps) * scale
    tl.store(out + row, result.to(out.dtype.element_ty), mask=k < K)


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
    kernel: Any = _project_kernel
    kernel[((heads + 2 * shared) * (d // 2 // _OUTPUTS),)](
        x, norm[0], *weights, *turn, slots, query, keys, values, norm[1], keys.stride(0), keys.stride(1), TOKENS=tokens,
        ROWS=rows * tokens, K=width, D=d, HEADS=heads, SHARED=shared, OUTPUTS=_OUTPUTS, WIDE=_WIDE, **_options(x, 1),
    )  # fmt: skip
    return query


def attend(query: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Attend to the cache.

    Args:
        query: ``[B, T, heads, d]``, contiguous.
        cache: see `project`.
        mask: ``[B, 1, T, ≤ S]``, added to the scores.
        slots: ``[B, T]``, contiguous, the queries' own; they see none behind it.
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
        TOKENS=tokens, HEADS=heads, GROUPS=heads // keys.shape[1], D=d, BLOCK=_BLOCK, **_options(query, 4),
    )  # fmt: skip
    return out.flatten(2)


def gate(x: Tensor, norm: Norm, gate: Tensor, up: Tensor) -> Tensor:
    """Gate a norm's result.

    With ``y`` the RMS norm of ``[B, T, K]``, and weights ``[N, K]``: ``silu(y gate') * (y up')``.
    """
    out = x.new_empty(*x.shape[:-1], len(gate))
    kernel: Any = _gate_kernel
    kernel[(len(gate) // _OUTPUTS,)](
        x, norm[0], gate, up, out, len(gate), norm[1], ROWS=x.numel() // x.shape[-1], K=x.shape[-1], OUTPUTS=_OUTPUTS,
        WIDE=_WIDE, **_options(x, 1),
    )  # fmt: skip
    return out


def multiply(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Return ``residual + x weight'`` of ``[B, T, K]`` and ``[N, K]``."""
    out = torch.empty_like(residual)
    outputs, wide, warps = _LONG if x.shape[-1] > _SHORT and x.shape[-1] % _LONG[1] == 0 else (_OUTPUTS, _WIDE, 1)
    kernel: Any = _multiply_kernel
    kernel[(len(weight) // outputs,)](
        x, weight, residual, out, len(weight), ROWS=x.numel() // x.shape[-1], K=x.shape[-1], OUTPUTS=outputs,
        WIDE=wide, **_options(x, warps),
    )  # fmt: skip
    return out


def join(left: Tensor, left_norm: Norm, right: Tensor, right_norm: Norm, weight: Tensor) -> Tensor:
    """Multiply two RMS norms, side by side, by a weight.

    They are of ``[B, T, K]``, the weight ``[N, 2 K]``.
    """
    out = left.new_empty(*left.shape[:-1], len(weight))
    kernel: Any = _join_kernel
    kernel[(len(weight) // _OUTPUTS,)](
        left, *left_norm, right, *right_norm, weight, out, len(weight), ROWS=left.numel() // left.shape[-1], K=left.shape[-1],
        OUTPUTS=_OUTPUTS, WIDE=_WIDE, **_options(left, 1),
    )  # fmt: skip
    return out


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Return the RMS norm of ``[B, T, K]``."""
    out, width = torch.empty_like(x), x.shape[-1]
    kernel: Any = _norm_kernel
    kernel[(x.numel() // width,)](
        x, norm[0], out, norm[1], K=width, PADDED=triton.next_power_of_2(width), **_options(x, 4)
    )  # fmt: skip
    return out


def _options(x: Tensor, warps: int) -> dict[str, Any]:
    early = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"EARLY": early, "num_warps": warps} | ({"launch_pdl": True} if early else {})

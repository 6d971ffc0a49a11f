"""Triton kernels of a chain's ends and of choosing tokens."""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001, ANN201, RUF005 - nor does it know a starred tuple
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wmtp.models.layer_kernels import Norm
from wmtp.models.product_kernels import early, let_begin, product, rows_of, scale_of, shape_of, tiles_of, wait

__all__ = ["best", "best_two", "join", "normalize", "normed"]


@triton.jit
def _join_kernel(
    left, left_norm, left_eps, right, right_norm, right_eps, weight, out, N, ROWS: tl.constexpr, PADDED: tl.constexpr,
    K: tl.constexpr, OUTPUTS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """``[norm(left); norm(right)] weight'``."""
    PIECES: tl.constexpr = (K + WIDE - 1) // WIDE
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tiles_of(weight, n, left_norm, 2 * K, K, WIDE, True)
    second = tiles_of(weight + K, n, right_norm, 2 * K, K, WIDE, True)
    wait(EARLY)
    let_begin(EARLY)
    one = rows_of(left, ROWS, PADDED, K, WIDE)
    other = rows_of(right, ROWS, PADDED, K, WIDE)
    result = product(one, first, PADDED, OUTPUTS, PIECES, WIDE) * scale_of(one, left_eps, PADDED, K, PIECES, WIDE)
    result += product(other, second, PADDED, OUTPUTS, PIECES, WIDE) * scale_of(other, right_eps, PADDED, K, PIECES, WIDE)
    row = tl.arange(0, PADDED)[:, None]
    tl.store(out + row * N + n[None, :], result.to(out.dtype.element_ty), mask=row < ROWS)


@triton.jit
def _norm_kernel(x, norm, out, eps, K: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr) -> None:
    """RMS norm of one row."""
    k = tl.arange(0, PADDED)
    scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    wait(EARLY)
    let_begin(EARLY)
    row = tl.program_id(0) * K + k
    given = tl.load(x + row, mask=k < K, other=0.0).to(tl.float32)
    result = given * tl.rsqrt(tl.sum(given * given) / K + eps) * scale
    tl.store(out + row, result.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def normed(given, norm, eps, PADDED: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, WIDE: tl.constexpr):
    """RMS norm of rows that were read."""
    scale = scale_of(given, eps, PADDED, K, PIECES, WIDE)[:, :, None]
    pieces = ()
    for piece in tl.static_range(PIECES):
        k = piece * WIDE + tl.arange(0, WIDE)
        pieces = pieces + (given[piece] * scale * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[None, None, :],)
    return pieces


@triton.jit
def _best_kernel(
    x, weight, at, norm, values, places, others, sizes, eps, P, ROWS: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr,
    OUTPUTS: tl.constexpr, WIDE: tl.constexpr, AT: tl.constexpr, NORM: tl.constexpr, TWO: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Find the largest of some of ``x weight'``, and its place.

    Also the second, and the largest absolute value. Of an RMS norm of x, where one is given.
    """
    PIECES: tl.constexpr = (K + WIDE - 1) // WIDE
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tiles = tiles_of(weight, n, weight, K, K, WIDE, False)
    wait(EARLY)
    let_begin(EARLY)
    if AT:
        x += tl.maximum(tl.load(at), 0) * K
    given = rows_of(x, ROWS, PADDED, K, WIDE)
    if NORM:
        given = normed(given, norm, eps, PADDED, K, PIECES, WIDE)
    logits = product(given, tiles, PADDED, OUTPUTS, PIECES, WIDE)
    best = tl.max(logits, axis=1)
    place = tl.argmax(logits, axis=1)
    row = tl.arange(0, PADDED)
    into = row * P + tl.program_id(0)
    tl.store(values + into, best, mask=row < ROWS)
    tl.store(places + into, place + tl.program_id(0) * OUTPUTS, mask=row < ROWS)
    if TWO:
        rest = tl.where(tl.arange(0, OUTPUTS)[None, :] == place[:, None], -float("inf"), logits)
        tl.store(others + into, tl.max(rest, axis=1), mask=row < ROWS)
        tl.store(sizes + into, tl.max(tl.abs(logits), axis=1), mask=row < ROWS)


@triton.jit
def _best_of_kernel(
    values, places, others, sizes, ids, best, first, second, size, P, PADDED: tl.constexpr, IDS: tl.constexpr,
    TWO: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Find the same of all, from what each program found."""
    wait(EARLY)
    let_begin(EARLY)
    row, part = tl.program_id(0), tl.arange(0, PADDED)
    there = part < P
    found = tl.load(values + row * P + part, mask=there, other=-float("inf"))
    which = tl.minimum(tl.argmax(found, axis=0), P - 1)  # where logits are NaN, a place beyond may be found
    place = tl.load(places + row * P + which).to(tl.int64)
    if IDS:
        place = tl.load(ids + place)
    tl.store(best + row, place)
    if TWO:
        largest = tl.max(found, axis=0)
        rest = tl.max(tl.where(part == which, -float("inf"), found), axis=0)
        tl.store(first + row, largest)
        tl.store(second + row, tl.maximum(rest, tl.load(others + row * P + which)))
        tl.store(size + row, tl.max(tl.load(sizes + row * P + part, mask=there, other=0.0), axis=0))


def join(left: Tensor, left_norm: Norm, right: Tensor, right_norm: Norm, weight: Tensor) -> Tensor:
    """Multiply two RMS norms, side by side, by a weight.

    They are of ``[B, T, K]``, the weight ``[N, 2 K]``.
    """
    out = left.new_empty(*left.shape[:-1], len(weight))
    shape = shape_of("join", left.numel() // left.shape[-1])
    kernel: Any = _join_kernel
    kernel[(len(weight) // shape["OUTPUTS"],)](
        left, *left_norm, right, *right_norm, weight, out, len(weight), K=left.shape[-1], **shape, **early(left)
    )
    return out


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Return the RMS norm of ``[B, T, K]``."""
    out, width = torch.empty_like(x), x.shape[-1]
    kernel: Any = _norm_kernel
    kernel[(x.numel() // width,)](
        x, norm[0], out, norm[1], K=width, PADDED=triton.next_power_of_2(width), num_warps=4, **early(x)
    )  # fmt: skip
    return out


def best_two(x: Tensor, weight: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the two largest of ``x weight'``.

    Args:
        x: ``[B, T, K]``.
        weight: ``[N, K]``.
        norm: of ``x``, before the product.

    Returns:
        the place of the largest, of equal ones the first; both, and the largest absolute value: ``[B, T]`` each.
    """
    return _best(x, weight, None, None, norm, None, two=True)


def best(
    x: Tensor, weight: Tensor, ids: Tensor | None, at: Tensor | None, norm: Norm | None = None, into: Tensor | None = None
) -> Tensor:
    """Find the largest of ``x weight'``; see `best_two`.

    Args:
        x: ``[B, T, K]``.
        weight: ``[N, K]``.
        ids: ``[N]``, what the places stand for; None: for themselves.
        at: ``[1, 1]``, which place of one text is looked at. None: all.
        norm: of ``x``, before the product.
        into: what is returned, if it is there already.

    Returns:
        ``[B, T]``, or ``[1, 1]``.
    """
    return _best(x, weight, ids, at, norm, into, two=False)[0]


def _best(
    x: Tensor, weight: Tensor, ids: Tensor | None, at: Tensor | None, norm: Norm | None, into: Tensor | None, *, two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = x.shape[:-1] if at is None else at.shape
    shape, begins = shape_of("best", size.numel()), early(x)
    rows, parts = shape["ROWS"], len(weight) // shape["OUTPUTS"]
    found = x.new_empty(3, rows, parts, dtype=torch.float32)
    places = x.new_empty(rows, parts, dtype=torch.int32)
    scaled, eps = norm or (weight, 0.0)
    kernel: Any = _best_kernel
    kernel[(parts,)](
        x, weight, places if at is None else at, scaled, found[0], places, found[1], found[2], eps, parts, K=x.shape[-1],
        AT=at is not None, NORM=norm is not None, TWO=two, **shape, **begins,
    )  # fmt: skip
    best = x.new_empty(size, dtype=torch.int64) if into is None else into
    numbers = x.new_empty(3, *size, dtype=torch.float32)
    kernel = _best_of_kernel
    kernel[(rows,)](
        found[0], places, found[1], found[2], places if ids is None else ids, best, *numbers, parts,
        PADDED=triton.next_power_of_2(parts), IDS=ids is not None, TWO=two, num_warps=8, **begins,
    )  # fmt: skip
    first, second, largest = numbers.unbind(0)
    return best, first, second, largest

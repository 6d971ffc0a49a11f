"""Triton kernels of what a chain's module begins and ends with."""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001
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

__all__ = ["join", "normalize"]


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

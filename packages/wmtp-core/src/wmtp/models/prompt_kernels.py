"""Triton kernels of a decoder layer for a prompt's tokens.

Each is a product in tiles with what is beside it: the norm before, rotation, the gate or the sum after. Products are of three
TF32 products each (``tf32x3``), whose error is that of fp32 and not of TF32.
"""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001, ANN202
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from wmtp.models.layer_kernels import Norm
from wmtp.models.product_kernels import early, let_begin, wait

__all__ = ["add_product", "gate", "project"]

#: tokens, outputs and columns of a tile, warps, and tiles under way
_SHAPES: Final = {
    "project": (64, 32, 64, 4, 3),
    "gate": (64, 32, 64, 4, 3),
    "out": (64, 16, 64, 4, 3),
    "down": (64, 16, 64, 4, 3),
}


@triton.jit
def _tile(x, norm, weight, row, column, k, tokens, K: tl.constexpr, NORM: tl.constexpr):
    """Read tiles ``[tokens, columns]`` and ``[columns, outputs]``, and the squares of the first."""
    given = tl.load(x + row[:, None] * K + k[None, :], mask=row[:, None] < tokens, other=0.0)
    squares = tl.sum(given * given, axis=1)
    if NORM:
        given = given * tl.load(norm + k)[None, :]
    return given, tl.load(weight + column[None, :] * K + k[:, None]), squares


@triton.jit
def _pair_kernel(
    x, norm, first, second, third, cos, sin, out, keys, values, tokens, eps, K: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, SHARED: tl.constexpr, ROTATES: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Two products of a norm, and what is made of both.

    ``ROTATES``: halves of a head of queries, keys or values, rotated; else a gate and what it lets through.
    """
    let_begin(EARLY)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if ROTATES:
        HALF: tl.constexpr = D // 2
        blocks = HALF // OUTPUTS
        head = tl.program_id(0) // blocks
        place = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
        if head < HEADS:
            left_weight = first + head * D * K
        elif head < HEADS + SHARED:
            left_weight = second + (head - HEADS) * D * K
        else:
            left_weight = third + (head - HEADS - SHARED) * D * K
        right_weight = left_weight + HALF * K
    else:
        place = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        left_weight, right_weight = first, second
    left = tl.zeros([ROWS, OUTPUTS], tl.float32)
    right = tl.zeros([ROWS, OUTPUTS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    wait(EARLY)
    for start in range(0, K, WIDE):
        k = start + tl.arange(0, WIDE)
        given, tile, square = _tile(x, norm, left_weight, row, place, k, tokens, K, True)
        left = tl.dot(given, tile, left, input_precision="tf32x3")
        right = tl.dot(given, tl.load(right_weight + place[None, :] * K + k[:, None]), right, input_precision="tf32x3")
        squares += square
    scale = tl.rsqrt(squares / K + eps)[:, None]
    left, right = left * scale, right * scale
    there = row[:, None] < tokens
    if ROTATES:
        if head < HEADS + SHARED:
            angle = row[:, None] * D + place[None, :]
            turned = left * tl.load(cos + angle, mask=there, other=0.0) - right * tl.load(sin + angle, mask=there, other=0.0)
            right = right * tl.load(cos + angle + HALF, mask=there, other=0.0) + left * tl.load(
                sin + angle + HALF, mask=there, other=0.0
            )
            left = turned
        if head < HEADS:
            into = out + head * tokens * D
        elif head < HEADS + SHARED:
            into = keys + (head - HEADS) * tokens * D
        else:
            into = values + (head - HEADS - SHARED) * tokens * D
        at = row[:, None] * D + place[None, :]
        tl.store(into + at, left, mask=there)
        tl.store(into + HALF + at, right, mask=there)
    else:
        tl.store(out + row[:, None] * N + place[None, :], left * tl.sigmoid(left) * right, mask=there)


@triton.jit
def _add_kernel(
    x, weight, residual, out, tokens, K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """``residual + x weight'``."""
    let_begin(EARLY)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    wait(EARLY)
    for start in range(0, K, WIDE):
        given, tile, _ = _tile(x, x, weight, row, place, start + tl.arange(0, WIDE), tokens, K, False)
        sums = tl.dot(given, tile, sums, input_precision="tf32x3")
    at, there = row[:, None] * N + place[None, :], row[:, None] < tokens
    tl.store(out + at, sums + tl.load(residual + at, mask=there, other=0.0), mask=there)


def project(x: Tensor, norm: Norm, weights: tuple[Tensor, Tensor, Tensor], turn: tuple[Tensor, Tensor], d: int) -> list[Tensor]:
    """Compute queries, keys and values.

    Args:
        x: ``[1, T, K]``, contiguous, before the norm.
        norm: before the products.
        weights: of queries ``[heads d, K]``, keys and values ``[shared heads d, K]``, contiguous.
        turn: cosines and sines of the positions, ``[1, T, d]``, contiguous.
        d: size of a head.

    Returns:
        ``[1, heads, T, d]``; keys and values of the shared heads.
    """
    tokens, (heads, shared, _) = x.shape[1], (len(weight) // d for weight in weights)
    found = [x.new_empty(1, count, tokens, d) for count in (heads, shared, shared)]
    shape = _shape("project", x, d // 2)
    kernel: Any = _pair_kernel
    kernel[((heads + 2 * shared) * (d // 2 // shape["OUTPUTS"]), triton.cdiv(tokens, shape["ROWS"]))](
        x,
        norm[0],
        *weights,
        *turn,
        *found,
        tokens,
        norm[1],
        N=0,
        D=d,
        HEADS=heads,
        SHARED=shared,
        ROTATES=True,
        **shape,
        **early(x),
    )
    return found


def gate(x: Tensor, norm: Norm, gate: Tensor, up: Tensor) -> Tensor:
    """Gate a norm's result; see `wmtp.models.layer_kernels.gate`."""
    out = x.new_empty(*x.shape[:-1], len(gate))
    shape = _shape("gate", x, len(gate))
    kernel: Any = _pair_kernel
    kernel[(len(gate) // shape["OUTPUTS"], triton.cdiv(x.shape[1], shape["ROWS"]))](
        x, norm[0], gate, up, up, x, x, out, out, out, x.shape[1], norm[1], N=len(gate), D=0, HEADS=0, SHARED=0, ROTATES=False,
        **shape, **early(x),
    )  # fmt: skip
    return out


def add_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Return ``residual + x weight'`` of ``[1, T, K]`` and ``[N, K]``."""
    out = x.new_empty(residual.shape)
    shape = _shape("down" if x.shape[-1] > len(weight) else "out", x, len(weight))
    kernel: Any = _add_kernel
    kernel[(len(weight) // shape["OUTPUTS"], triton.cdiv(x.shape[1], shape["ROWS"]))](
        x, weight, residual, out, x.shape[1], N=len(weight), **shape, **early(x)
    )
    return out


def _shape(kernel: str, x: Tensor, outputs: int) -> dict[str, int]:
    """Return a kernel's options: the sizes of its tiles, which divide ``outputs``."""
    rows, most, wide, warps, stages = _SHAPES[kernel]
    sizes = {"ROWS": rows, "OUTPUTS": min(most, outputs), "WIDE": wide}
    return {"K": x.shape[-1], **sizes, "num_warps": warps, "num_stages": stages}

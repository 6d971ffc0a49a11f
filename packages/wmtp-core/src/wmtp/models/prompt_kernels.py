"""Triton kernels of a decoder layer for a prompt's tokens.

Two products of a norm's result in tiles, and what is made of both: rotated halves of heads, or a gated MLP's middle. Each is
three products in TF32 (``tf32x3``), whose error together is that of fp32.
"""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from wmtp.models.layer_kernels import Norm
from wmtp.models.product_kernels import early, let_begin, wait

__all__ = ["gate", "project"]

#: tokens, outputs and columns of a tile
_ROWS: Final = 32
_OUTPUTS: Final = 16
_WIDE: Final = 64


@triton.jit
def _pair_kernel(
    x, norm, first, second, third, cos, sin, out, keys, values, tokens, eps, K: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, SHARED: tl.constexpr, ROTATES: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    WIDE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply a norm's result by two weights, and join both products.

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
        given = tl.load(x + row[:, None] * K + k[None, :], mask=row[:, None] < tokens, other=0.0)
        squares += tl.sum(given * given, axis=1)
        given = given * tl.load(norm + k)[None, :]
        tile = place[None, :] * K + k[:, None]
        left = tl.dot(given, tl.load(left_weight + tile), left, input_precision="tf32x3")
        right = tl.dot(given, tl.load(right_weight + tile), right, input_precision="tf32x3")
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
    kernel: Any = _pair_kernel
    kernel[((heads + 2 * shared) * (d // 2 // _OUTPUTS), triton.cdiv(tokens, _ROWS))](
        x, norm[0], *weights, *turn, *found, tokens, norm[1], N=0, D=d, HEADS=heads, SHARED=shared, ROTATES=True, **_options(x)
    )  # fmt: skip
    return found


def gate(x: Tensor, norm: Norm, gate: Tensor, up: Tensor) -> Tensor:
    """Gate a norm's result; see `wmtp.models.layer_kernels.gate`."""
    out = x.new_empty(*x.shape[:-1], len(gate))
    kernel: Any = _pair_kernel
    kernel[(len(gate) // _OUTPUTS, triton.cdiv(x.shape[1], _ROWS))](
        x, norm[0], gate, up, up, x, x, out, out, out, x.shape[1], norm[1], N=len(gate), D=0, HEADS=0, SHARED=0, ROTATES=False,
        **_options(x),
    )  # fmt: skip
    return out


def _options(x: Tensor) -> dict[str, Any]:
    tile = {"K": x.shape[-1], "ROWS": _ROWS, "OUTPUTS": _OUTPUTS, "WIDE": _WIDE}
    return tile | {"num_warps": 2, "num_stages": 4} | early(x)

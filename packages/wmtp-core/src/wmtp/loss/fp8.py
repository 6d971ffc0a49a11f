"""Unembedding products in fp8 (arXiv 2209.05433).

Of the logits, and of the hidden states' gradient where that is asked for.

Scales are powers of two, so a number is rounded once and what two chunks share is rounded alike. The gradient of the
unembedding stays in bf16: its product reads both operands by columns, and tensor cores read fp8 by rows alone.
"""

from __future__ import annotations

from typing import Final

import torch
from attrs import define
from torch import Tensor

__all__ = ["PIECE", "SLOPE_FORMAT", "SLOPE_RANGE", "Fp8Logits", "Rounded", "in_fp8", "multiply", "round_table", "round_to_fp8"]

#: fp8 products need rows and columns in whole pieces of so many numbers
PIECE: Final = 16
#: of gradients of logits: softmax has tails that e4m3 would cut off
SLOPE_FORMAT: Final = torch.float8_e5m2
#: a gradient of 1 before coefficients, the largest there is, in that format
SLOPE_RANGE: Final = 2.0**15
#: numbers of a table that are rounded at once
_SLICE: Final = 2**24
_FORMAT: Final = torch.float8_e4m3fn


@define(kw_only=True, slots=False)
class Fp8Logits:
    """Products of the loss that are in fp8, and their scales.

    Args:
        gradient: of the hidden states too; else the logits alone.
        fast: logits add up in the tensor cores' own precision. Gradients do not: among the many terms of a vocabulary the small
            ones would be lost.
        emulate: rounds to fp8, and multiplies as without it.
    """

    gradient: bool = False
    fast: bool = True
    emulate: bool = False


@define(kw_only=True, eq=False, slots=False)
class Rounded:
    """Numbers in fp8, with the power of two that scales them.

    Args:
        data: fp8.
        scale: scalar fp32.
    """

    data: Tensor
    scale: Tensor

    def value(self, dtype: torch.dtype) -> Tensor:
        """Compute the numbers, which bf16 holds exactly."""
        return self.data.to(dtype) * self.scale.to(dtype)


def in_fp8(tensor: Tensor) -> Tensor:
    """Round a tensor to what fp8 holds, in its own precision."""
    return round_to_fp8(tensor).value(tensor.dtype)


def round_to_fp8(tensor: Tensor) -> Rounded:
    """Round a tensor, without waiting for its device."""
    scale = _scale(tensor)
    return Rounded(data=_rounded(tensor, scale), scale=scale)


def round_table(weight: Tensor, rows: int) -> Rounded:
    """Round an unembedding ``[V, D]`` slice by slice, padded with zero rows."""
    scale = _scale(weight)
    data = torch.empty(rows, weight.shape[1], dtype=_FORMAT, device=weight.device)
    data[len(weight) :] = 0
    step = max(1, _SLICE // weight.shape[1])
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        data[start : start + len(part)] = _rounded(part, scale)
    return Rounded(data=data, scale=scale)


def multiply(left: Rounded, right: Rounded, out: Tensor, *, fast: bool, emulate: bool) -> Tensor:
    """Compute ``left · rightᵀ`` into ``out``.

    Args:
        left: ``[N, K]``, its rows in one piece.
        right: ``[M, K]``, likewise.
        out: ``[N, M]``.
        fast: add up in the tensor cores' own precision.
        emulate: multiply in the precision of ``out``.
    """
    if emulate:
        return torch.mm(left.value(out.dtype), right.value(out.dtype).T, out=out)
    return torch._scaled_mm(
        left.data,
        right.data.T,
        scale_a=left.scale,
        scale_b=right.scale,
        out_dtype=out.dtype,
        use_fast_accum=fast,
        out=out,
    )


def _scale(tensor: Tensor) -> Tensor:
    """Find the power of two by which the largest number just fits."""
    highest = torch.linalg.vector_norm(tensor, torch.inf, dtype=torch.float32).clamp_(min=2.0**-100)
    return torch.exp2(torch.ceil(torch.log2(highest / torch.finfo(_FORMAT).max)))


def _rounded(tensor: Tensor, scale: Tensor) -> Tensor:
    # log2 may be off by a bit of fp32 where the largest number is a power of two times 448: then it saturates
    limit = torch.finfo(_FORMAT).max
    return (tensor * scale.reciprocal().to(tensor.dtype)).clamp_(-limit, limit).to(_FORMAT)

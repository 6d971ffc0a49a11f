"""Unembedding products in fp8 (arXiv 2209.05433).

Of the logits, and of the hidden states' gradient where that is asked for.

Scales are powers of two, so a number is rounded once and what two chunks share is rounded alike. An unembedding is rounded
without its mean row where softmax follows at once: that moves all logits of a position alike, which softmax does not see, and
what is left is smaller, as is its error (on SmolLM2-135M the loss moves by half as much). The gradient of the
unembedding stays in bf16: its product reads both operands by columns, and tensor cores read fp8 by rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from attrs import define
from torch import Tensor

__all__ = [
    "PIECE",
    "SLOPE_FORMAT",
    "SLOPE_RANGE",
    "Fp8Logits",
    "Rounded",
    "in_fp8",
    "multiply",
    "round_table",
    "round_to_fp8",
    "table_in_fp8",
]

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


def table_in_fp8(weight: Tensor, *, centered: bool) -> Tensor:
    """Round an unembedding as `round_table` does, in its own precision."""
    return in_fp8(weight - weight.mean(0) if centered else weight)


def round_table(weight: Tensor, rows: int, *, centered: bool) -> Rounded:
    """Round an unembedding ``[V, D]`` slice by slice, padded with zero rows.

    Args:
        weight: the unembedding.
        rows: V or more.
        centered: without its mean row; else as it is.
    """
    middle = weight.mean(0) if centered else None
    step = max(1, _SLICE // weight.shape[1])

    def slices() -> Iterator[Tensor]:
        for part in weight.split(step):
            yield part if middle is None else part - middle

    highest = torch.stack([_highest(part) for part in slices()]).amax()
    scale = _power(highest)
    data = torch.empty(rows, weight.shape[1], dtype=_FORMAT, device=weight.device)
    data[len(weight) :] = 0
    for number, part in enumerate(slices()):
        data[number * step : number * step + len(part)] = _rounded(part, scale)
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
    return _power(_highest(tensor))


def _highest(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, torch.inf, dtype=torch.float32)


def _power(highest: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(highest.clamp(min=2.0**-100) / torch.finfo(_FORMAT).max)))


def _rounded(tensor: Tensor, scale: Tensor) -> Tensor:
    # log2 may be off by a bit of fp32 where the largest number is a power of two times 448: then it saturates
    limit = torch.finfo(_FORMAT).max
    return (tensor * scale.reciprocal().to(tensor.dtype)).clamp_(-limit, limit).to(_FORMAT)

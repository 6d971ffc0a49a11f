"""Triton kernel that brings weights of 4 bits back (`wmtp.models.quantized`)."""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["dequantize"]

#: scales of a program
_ROWS = 64


@triton.jit
def _dequantize_kernel(packed, scales, table, out, size, held, ROWS: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """Compute ``out[i] = table[code i] · scales[i // WIDTH]``.

    Of two codes in each of ``held`` bytes, the first has the high bits.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale = tl.load(scales + row, mask=row * WIDTH < size, other=0.0)[:, None]
    byte = row[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
    codes = tl.load(packed + byte, mask=byte < held, other=0).to(tl.int32)
    values = tl.interleave(tl.load(table + (codes >> 4)) * scale, tl.load(table + (codes & 15)) * scale)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < size)


def dequantize(packed: Tensor, scales: Tensor, table: Tensor, out: Tensor, *, block: int) -> Tensor:
    """Fill ``out`` with the weights of 4-bit codes.

    Everything is read and written once. bitsandbytes' own kernel is not limited by memory alone. In Triton's interpreter the
    numbers are its own, bit for bit in fp32; on a GPU they were not compared.

    Args:
        packed: uint8, two codes a byte, for the N numbers of ``out``.
        scales: ``[N / block]`` rounded up, fp32.
        table: ``[16]`` fp32, the values of NF4 (arXiv 2305.14314, §3).
        out: N numbers of any shape and precision, contiguous.
        block: weights that share a scale.

    Returns:
        ``out``.
    """
    kernel: Any = _dequantize_kernel
    programs = -(-scales.numel() // _ROWS)
    with torch.cuda.device_of(packed):  # Triton computes on the current device, wherever its arguments are
        kernel[(programs,)](packed, scales, table, out, out.numel(), packed.numel(), ROWS=_ROWS, WIDTH=block)
    return out

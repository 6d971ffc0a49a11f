"""Triton kernel that transposes numbers of 8 bits (`wmtp.models.fp8_frozen`)."""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["transpose"]

#: rows and columns of a program
_SIDE: Final = 128


@triton.jit
def _transpose_kernel(matrix, out, rows, columns, SIDE: tl.constexpr) -> None:
    """``out[j, i] = matrix[i, j]``; one square a program."""
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    square = tl.load(matrix + row[:, None] * columns + column[None, :], mask=inside, other=0)
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(square), mask=tl.trans(inside))


def transpose(matrix: Tensor) -> Tensor:
    """Return the transposed matrix in memory of its own.

    torch's copy of single bytes is not limited by memory alone.

    Args:
        matrix: ``[N, K]`` of 8 bits a number, contiguous.
    """
    rows, columns = matrix.shape
    out = torch.empty((columns, rows), dtype=torch.uint8, device=matrix.device)
    kernel: Any = _transpose_kernel
    grid = (-(-rows // _SIDE), -(-columns // _SIDE))
    with torch.cuda.device_of(matrix):  # Triton computes on the current device, wherever its arguments are
        kernel[grid](matrix.view(torch.uint8), out, rows, columns, SIDE=_SIDE)
    return out.view(matrix.dtype)

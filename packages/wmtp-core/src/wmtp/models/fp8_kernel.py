"""Triton kernels that round to fp8 and transpose (`wmtp.models.fp8_frozen`, `wmtp.models.fp8_linear`)."""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["round_matrix", "transpose"]

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


@triton.jit
def _round_kernel(
    matrix, stride, scale, across, down, rows, columns, filled, LIMIT: tl.constexpr, ACROSS: tl.constexpr, SIDE: tl.constexpr
) -> None:
    """``across[i, j] = down[j, i] = matrix[i, j] · scale`` in fp8.

    One square a program; zeros behind the last row.
    """
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    square = tl.load(matrix + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    square = tl.minimum(tl.maximum(square * tl.load(scale), -LIMIT), LIMIT)
    rounded = square.to(across.dtype.element_ty)
    if ACROSS:
        tl.store(across + row[:, None] * columns + column[None, :], rounded, mask=inside)
    turned = tl.trans(rounded.to(tl.uint8, bitcast=True))
    tl.store(down + column[:, None] * filled + row[None, :], turned, mask=(column < columns)[:, None] & (row < filled)[None, :])


def round_matrix(
    matrix: Tensor, scale: Tensor, kind: torch.dtype, filled: int, *, across: bool
) -> tuple[Tensor | None, Tensor]:
    """Round a matrix by rows and by columns, in one pass.

    Args:
        matrix: ``[N, K]``.
        scale: scalar fp32, by which numbers are multiplied.
        kind: format of 8 bits.
        filled: N or more; columns have so many numbers, zeros behind the last.
        across: by rows too.

    Returns:
        ``[N, K]`` or None, and ``[K, filled]``.
    """
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    rows, columns = matrix.shape
    down = torch.empty((columns, filled), dtype=torch.uint8, device=matrix.device)
    # without it the kernel still learns the format there
    out = torch.empty((rows, columns) if across else (1, 1), dtype=kind, device=matrix.device)
    kernel: Any = _round_kernel
    grid = (-(-filled // _SIDE), -(-columns // _SIDE))
    sizes = rows, columns, filled
    form = {"LIMIT": torch.finfo(kind).max, "ACROSS": across, "SIDE": _SIDE, "num_warps": 8}
    with torch.cuda.device_of(matrix):  # Triton computes on the current device, wherever its arguments are
        kernel[grid](matrix, matrix.stride(0), scale, out, down, *sizes, **form)
    return out if across else None, down.view(kind)

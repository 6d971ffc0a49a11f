"""Linear maps that learn and multiply in fp8 (arXiv 2209.05433).

A tensor has one scale. y = x · Wᵀ, d x = d y · W and d W = d yᵀ · x have each operand in fp8. Tensor cores read
fp8 along the sum alone, so x, d y and W are needed by columns as well. One pass over memory rounds a tensor and writes both:
as two passes, which is what a compiler makes of it, it is read twice. The numbers are those of torchao's tensorwise recipe.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from wmtp.loss.cross_entropy import implementation, precision
from wmtp.models.fp8_frozen import FORMAT, WIDE, Products, emulated, round_by, scale_to

__all__ = ["Fp8Linear"]

#: rows of a transposed tensor are filled up with zeros to whole pieces of so many numbers
_PIECE: Final = 16


class Fp8Linear(nn.Linear):
    """A linear map whose products are in fp8; `nn.Linear` otherwise."""

    products: Products

    @classmethod
    def take_over(cls, linear: nn.Linear, products: Products) -> None:
        """Have a map multiply in fp8, in place.

        Its parameters, name and hooks stay.
        """
        linear.__class__ = cls
        linear.products = products  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map ``[..., in_features]`` to ``[..., out_features]``.

        The result has the precision of x or of autocast.
        """
        dtype = precision(x)
        learns = self.weight.requires_grad and torch.is_grad_enabled()
        result = _Product.apply(x.to(dtype), self.weight.to(dtype), self.products, learns)
        return result if self.bias is None else result + self.bias.to(dtype)  # type: ignore[operator]


class _Product(torch.autograd.Function):
    """Product x · Wᵀ with both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Products, learns: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale, of_weight = _scale(rows, FORMAT), _scale(weight, FORMAT)
        rounded, columns = _both(rows, scale, FORMAT) if learns else (round_by(rows, scale, FORMAT), None)
        ctx.save_for_backward(columns, scale, weight, of_weight)
        ctx.products = products
        result = _multiply(rounded, scale, round_by(weight, of_weight, FORMAT), of_weight, x.dtype, products, forward=True)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        columns, of_x, weight, of_weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        scale = _scale(rows, WIDE)
        if columns is None:
            rounded, of_weights = round_by(rows, scale, WIDE), None
        else:
            rounded, turned = _both(rows, scale, WIDE)
            of_weights = _multiply(turned, scale, columns, of_x, weight.dtype, ctx.products, forward=False)
        by_columns = _down(weight, of_weight, FORMAT)
        found = _multiply(rounded, scale, by_columns, of_weight, gradient.dtype, ctx.products, forward=False)
        return found.view(*gradient.shape[:-1], -1), of_weights, None, None


def _multiply(
    left: Tensor, of_left: Tensor, right: Tensor, of_right: Tensor, dtype: torch.dtype, products: Products, *, forward: bool
) -> Tensor:
    """Compute ``left · rightᵀ``.

    Args:
        left, right: in fp8, each row in one piece.
        of_left, of_right: by what their numbers were multiplied.
        dtype: of the result.
        products: how to multiply.
        forward: in the forward pass; else for a gradient.
    """
    of_left, of_right = of_left.reciprocal(), of_right.reciprocal()
    if products.emulate:
        return emulated(left.float() * of_left, (right.float() * of_right).t(), dtype)
    fast = products.fast_forward if forward else products.fast_backward
    return torch._scaled_mm(left, right.t(), scale_a=of_left, scale_b=of_right, out_dtype=dtype, use_fast_accum=fast)


def _scale(matrix: Tensor, kind: torch.dtype) -> Tensor:
    # row by row first: so a compiler finds it while it makes the rows
    return scale_to(matrix.abs().amax(dim=1).amax(), kind)


# Operators of their own, into which no compiler looks: it would read the matrix once for each result.
@torch.library.custom_op("wmtp::fp8_both", mutates_args=())
def _both(matrix: Tensor, scale: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to fp8, by rows and by columns.

    Returns ``[T, K]``, and ``[K, T]`` with zeros up to whole pieces.
    """
    if implementation(matrix.device, torch.bfloat16) == "fused":
        from wmtp.models import fp8_kernel  # imports Triton

        across, down = fp8_kernel.round_matrix(matrix, scale, kind, _filled(len(matrix)), across=True)
        assert across is not None, "asked for"
        return across, down
    across = round_by(matrix, scale, kind)
    return across, _turned(across)


@_both.register_fake
def _(matrix: Tensor, scale: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    return matrix.new_empty((rows, columns), dtype=kind), matrix.new_empty((columns, _filled(rows)), dtype=kind)


@torch.library.custom_op("wmtp::fp8_down", mutates_args=())
def _down(matrix: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Round ``[N, K]`` to fp8 by columns, ``[K, N]``."""
    if implementation(matrix.device, torch.bfloat16) == "fused":
        from wmtp.models import fp8_kernel  # imports Triton

        return fp8_kernel.round_matrix(matrix, scale, kind, _filled(len(matrix)), across=False)[1]
    return _turned(round_by(matrix, scale, kind))


@_down.register_fake
def _(matrix: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    rows, columns = matrix.shape
    return matrix.new_empty((columns, _filled(rows)), dtype=kind)


def _turned(across: Tensor) -> Tensor:
    rows, columns = across.shape
    out = torch.zeros((columns, _filled(rows)), dtype=torch.uint8, device=across.device)
    out[:, :rows] = across.view(torch.uint8).t()
    return out.view(across.dtype)


def _filled(rows: int) -> int:
    return -(-rows // _PIECE) * _PIECE

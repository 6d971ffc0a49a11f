"""Operator of an adapted linear map whose weight is kept in 4 bits and multiplied in fp8.

A weight comes back to fp8 for each product, in the backward pass too, so that nothing of its full size is kept between. Blocks
share scales in 4 bits; in fp8 all of the weight has one, which follows from theirs.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from wmtp.models.fp8_frozen import Products, multiply_back, product, round_gradient, round_input
from wmtp.models.quantized import Linear4Bit, dequantize_to_fp8

__all__ = ["OPERATOR", "adapted_linear_4bit_fp8"]


def adapted_linear_4bit_fp8(x: Tensor, base: Linear4Bit, products: Products, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Multiply by a weight of 4 bits and its adapter.

    Args:
        x: ``[..., D]``, in the precision of the products.
        base: the map, whose bias is added.
        products: how to multiply.
        down: A, ``[r, D]``.
        up: B, ``[N, r]``.
        scale: s.
    """
    rows = x.reshape(-1, x.shape[-1])
    low = torch.nn.functional.linear(rows, down) * scale
    rounded, of_rows = round_input(rows, products)
    flags = products.by_rows, products.fast_forward, products.fast_backward, products.emulate
    found = _adapted(rows, rounded, of_rows, base.packed, base.scales, low, up, *flags)
    found = found.view(*x.shape[:-1], -1)
    return found if base.bias is None else found + base.bias.to(x.dtype)  # type: ignore[operator]


@torch.library.custom_op("wmtp::adapted_linear_4bit_fp8", mutates_args=())
def _adapted(
    x: Tensor,
    rounded: Tensor,
    of_rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    low: Tensor,
    up: Tensor,
    by_rows: bool,
    fast_forward: bool,
    fast_backward: bool,
    emulate: bool,
) -> Tensor:
    """Compute the sum from x in fp8 and s·A·x; x itself is there for its gradient."""
    products = Products(by_rows=by_rows, fast_forward=fast_forward, fast_backward=fast_backward, emulate=emulate)
    stored, scale = dequantize_to_fp8(packed, scales, up.shape[0], x.shape[1])
    scale = scale.expand(up.shape[0], 1).contiguous() if by_rows else scale
    return product(rounded, of_rows, stored, scale, x.dtype, products).addmm_(low, up.t())


@_adapted.register_fake
def _(x: Tensor, rounded: Tensor, of_rows: Tensor, packed: Tensor, scales: Tensor, low: Tensor, up: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], up.shape[0]))


@torch.library.custom_op("wmtp::adapted_linear_4bit_fp8_backward", mutates_args=())
def _gradient(
    rounded: Tensor,
    of_rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    columns: int,
    dtype: torch.dtype,
    fast: bool,
    emulate: bool,
) -> Tensor:
    """Multiply a rounded gradient by the weight."""
    stored, scale = dequantize_to_fp8(packed, scales, rounded.shape[1], columns)
    scale = scale.expand(1, columns).contiguous() if of_rows.ndim else scale
    return multiply_back(rounded, of_rows, stored, scale, dtype, fast=fast, emulate=emulate)


@_gradient.register_fake
def _(
    rounded: Tensor,
    of_rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    columns: int,
    dtype: torch.dtype,
    fast: bool,
    emulate: bool,
) -> Tensor:
    return rounded.new_empty((rounded.shape[0], columns), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, packed, scales, low, up, *flags = inputs
    ctx.flags, ctx.columns = flags, x.shape[1]
    ctx.save_for_backward(packed, scales, low, up)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Pass on the gradients of x by way of the weight, of s·A·x and of B, where they are asked for."""
    packed, scales, low, up = ctx.saved_tensors
    by_rows, fast_forward, fast_backward, emulate = ctx.flags
    gradient, of_x = gradient.contiguous(), None
    if ctx.needs_input_grad[0]:
        products = Products(by_rows=by_rows, fast_forward=fast_forward, fast_backward=fast_backward, emulate=emulate)
        own = round_gradient(gradient, products)
        of_x = _gradient(*own, packed, scales, ctx.columns, gradient.dtype, fast_backward, emulate)
    of_low = gradient @ up if ctx.needs_input_grad[5] else None
    of_up = gradient.t() @ low if ctx.needs_input_grad[6] else None
    return of_x, None, None, None, None, of_low, of_up, None, None, None, None


_adapted.register_autograd(_differentiate, setup_context=_keep)

#: whose result activation checkpointing keeps with those of other products
OPERATOR: Final = torch.ops.wmtp.adapted_linear_4bit_fp8.default

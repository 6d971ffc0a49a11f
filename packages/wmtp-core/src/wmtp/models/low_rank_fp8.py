"""Operator of a linear map with a frozen weight in fp8 and a low-rank adapter, W·x + s·B·A·x.

Rounding of x and of the gradient stays outside, where a compiler joins it to what comes before, and maps of one input share it.
The sum is one result, so activation checkpointing that keeps results of products keeps no more than without the adapter.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from wmtp.models.fp8_frozen import FrozenFp8Linear, Products, gradient_of_input, product, round_input

__all__ = ["OPERATOR", "adapted_linear_fp8"]


def adapted_linear_fp8(x: Tensor, base: FrozenFp8Linear, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Multiply by a weight in fp8 and its adapter.

    Args:
        x: ``[..., D]``, in the precision of the products.
        base: the map, whose bias is added.
        down: A, ``[r, D]``.
        up: B, ``[N, r]``.
        scale: s.
    """
    rows = x.reshape(-1, x.shape[-1])
    low = torch.nn.functional.linear(rows, down) * scale
    rounded, of_rows = round_input(rows, base.products)
    found = _adapted(rows, rounded, of_rows, base.stored, base.scale, low, up, *_flags(base.products))
    found = found.view(*x.shape[:-1], -1)
    return found if base.bias is None else found + base.bias.to(x.dtype)  # type: ignore[operator]


def _flags(products: Products) -> tuple[bool, bool, bool, bool]:
    return products.by_rows, products.fast_forward, products.fast_backward, products.emulate


@torch.library.custom_op("wmtp::adapted_linear_fp8", mutates_args=())
def _adapted(
    x: Tensor,
    rounded: Tensor,
    of_rows: Tensor,
    stored: Tensor,
    scale: Tensor,
    low: Tensor,
    up: Tensor,
    by_rows: bool,
    fast_forward: bool,
    fast_backward: bool,
    emulate: bool,
) -> Tensor:
    """Compute the sum from x in fp8 and s·A·x; x itself is there for its gradient."""
    products = Products(by_rows=by_rows, fast_forward=fast_forward, fast_backward=fast_backward, emulate=emulate)
    return product(rounded, of_rows, stored, scale, x.dtype, products).addmm_(low, up.t())


@_adapted.register_fake
def _(x: Tensor, rounded: Tensor, of_rows: Tensor, stored: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], stored.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, stored, scale, low, up, *flags = inputs
    ctx.flags = flags
    ctx.save_for_backward(stored, scale, low, up)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Pass on the gradients of x by way of the weight, of s·A·x and of B, where they are asked for."""
    stored, scale, low, up = ctx.saved_tensors
    by_rows, fast_forward, fast_backward, emulate = ctx.flags
    products = Products(by_rows=by_rows, fast_forward=fast_forward, fast_backward=fast_backward, emulate=emulate)
    gradient = gradient.contiguous()
    of_x = gradient_of_input(gradient, stored, scale, products) if ctx.needs_input_grad[0] else None
    of_low = gradient @ up if ctx.needs_input_grad[5] else None
    of_up = gradient.t() @ low if ctx.needs_input_grad[6] else None
    return of_x, None, None, None, None, of_low, of_up, None, None, None, None


_adapted.register_autograd(_differentiate, setup_context=_keep)

#: whose result activation checkpointing keeps with those of other products
OPERATOR: Final = torch.ops.wmtp.adapted_linear_fp8.default

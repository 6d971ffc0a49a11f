"""Operators of linear maps with a low-rank adapter, W·x + s·B·A·x, each as one.

As two products and a sum, activation checkpointing that keeps products would keep both in place of their sum, and so more than
no checkpointing at all. As one, the sum alone is kept, with A·x of rank r; and the sum takes no pass of its own.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from wmtp.models.quantized import dequantize, product_backward

__all__ = ["OPERATORS", "adapted_linear", "adapted_linear_4bit"]


@torch.library.custom_op("wmtp::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Multiply by a weight and its adapter, all in one precision.

    Args:
        x: ``[..., D]``.
        weight: ``[N, D]``, which never learns.
        bias: ``[N]``; None where there is none.
        down: A, ``[r, D]``.
        up: B, ``[N, r]``.
        scale: s.

    Returns:
        ``[..., N]``, and A·x ``[..., r]``, which the backward pass needs.
    """
    return _add(x, linear(x.reshape(-1, x.shape[-1]), weight, bias), down, up, scale)


@torch.library.custom_op("wmtp::adapted_linear_4bit", mutates_args=())
def adapted_linear_4bit(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Multiply as `adapted_linear` does, by a weight that is kept in 4 bits (`wmtp.models.quantized.Linear4Bit`)."""
    weight = dequantize(packed, scales, up.shape[0], down.shape[1], x.dtype)
    return _add(x, linear(x.reshape(-1, x.shape[-1]), weight, bias), down, up, scale)


def _add(x: Tensor, result: Tensor, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    low = linear(x.reshape(-1, x.shape[-1]), down)
    result.addmm_(low, up.t(), alpha=scale)
    return result.view(*x.shape[:-1], -1), low.view(*x.shape[:-1], -1)


@adapted_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], up.shape[0])), x.new_empty((*x.shape[:-1], up.shape[1]))


@adapted_linear_4bit.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], up.shape[0])), x.new_empty((*x.shape[:-1], up.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight, _, down, up, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], down, up, *weight)


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """Pass on the gradients of x and of both matrices, where they are asked for; the weight has none."""
    x, low, down, up, *weight = ctx.saved_tensors
    gradient = gradient.reshape(-1, gradient.shape[-1])
    needs_x, needs_down, needs_up = (ctx.needs_input_grad[i] for i in (0, -3, -2))
    of_x = of_down = of_up = None
    of_low = ctx.scale * (gradient @ up) if needs_x or needs_down else None
    if needs_up:
        of_up = ctx.scale * (gradient.t() @ low.reshape(-1, low.shape[-1]))
    if needs_down and of_low is not None:
        of_down = of_low.t() @ x.reshape(-1, x.shape[-1])
    if needs_x and of_low is not None:
        through = gradient @ weight[0] if len(weight) == 1 else product_backward(gradient, *weight, up.shape[0], down.shape[1])
        of_x = (through + of_low @ down).view(x.shape)
    return of_x, *(None for _ in weight), None, of_down, of_up, None


adapted_linear.register_autograd(_differentiate, setup_context=_keep)
adapted_linear_4bit.register_autograd(_differentiate, setup_context=_keep)

#: products with weights that never learn, whose results activation checkpointing keeps with those of other products
OPERATORS: Final = frozenset(
    {
        torch.ops.wmtp.adapted_linear.default,
        torch.ops.wmtp.adapted_linear_4bit.default,
        torch.ops.wmtp.linear_4bit.default,
    }
)

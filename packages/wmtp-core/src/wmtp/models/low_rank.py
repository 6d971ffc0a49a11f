"""Linear maps with a low-rank adapter, W·x + s·B·A·x, as one operator.

As two products and a sum, activation checkpointing that keeps products would keep both in place of their sum, and so more than
no checkpointing at all. As one, the sum alone is kept, with A·x of rank r; and the sum takes no pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from wmtp.models.quantized import dequantize

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
        ``[..., N]``, and s·A·x ``[..., r]``, which the backward pass needs.
    """
    return _multiply(x, weight, bias, down, up, scale)


@torch.library.custom_op("wmtp::adapted_linear_4bit", mutates_args=())
def adapted_linear_4bit(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Multiply as `adapted_linear` does, by a weight in 4 bits.

    See `wmtp.models.quantized.Linear4Bit`.
    """
    return _multiply(x, dequantize(packed, scales, up.shape[0], down.shape[1], x.dtype), bias, down, up, scale)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    low = _scaled(rows, down.t(), scale)
    result = low @ up.t() if bias is None else torch.addmm(bias, low, up.t())
    # The large product comes last: it is limited by arithmetic, and adds to what it reads meanwhile. The other way round,
    # all of its result would be read and written once more.
    result.addmm_(rows, weight.t())
    return result.view(*x.shape[:-1], -1), low.view(*x.shape[:-1], -1)


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Multiply two matrices and a number in one pass."""
    return left.new_empty((left.shape[0], right.shape[1])).addmm_(left, right, beta=0, alpha=scale)


@torch.library.custom_op("wmtp::adapted_linear_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    x: Tensor,
    low: Tensor,
    weight: Sequence[Tensor],
    down: Tensor,
    up: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x and of both matrices.

    Those that are not wanted are empty.

    Args:
        gradient: ``[T, N]``.
        x: ``[T, D]``.
        low: ``[T, r]``, s·A·x.
        weight: the weight; or the two tensors that it is kept in.
        down: A.
        up: B.
        scale: s.
        wanted: of x, A and B.
    """
    of_x, of_down, of_up = (gradient.new_empty(0) for _ in range(3))
    if wanted[2]:
        of_up = gradient.t() @ low
    if wanted[0] or wanted[1]:
        of_low = _scaled(gradient, up, scale)
        if wanted[1]:
            of_down = of_low.t() @ x
        if wanted[0]:
            of_x = of_low @ down
            of_x.addmm_(gradient, _whole(weight, up.shape[0], down.shape[1], gradient.dtype))
    return of_x, of_down, of_up


def _whole(weight: Sequence[Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return weight[0] if len(weight) == 1 else dequantize(weight[0], weight[1], rows, columns, dtype)


@adapted_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], up.shape[0])), x.new_empty((*x.shape[:-1], up.shape[1]))


@adapted_linear_4bit.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], up.shape[0])), x.new_empty((*x.shape[:-1], up.shape[1]))


@_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    low: Tensor,
    weight: Sequence[Tensor],
    down: Tensor,
    up: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((gradient.shape[0], down.shape[1]), down.shape, up.shape)
    of_x, of_down, of_up = (gradient.new_empty(shape if asked else 0) for shape, asked in zip(shapes, wanted, strict=True))
    return of_x, of_down, of_up


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight, _, down, up, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], down, up, *weight)


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """Pass on the gradients of x and of both matrices.

    Only those that are asked for; the weight has none.
    """
    x, low, down, up, *weight = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, -3, -2)]
    # as matrices already here, where a compiler sees it: what lies otherwise in memory takes no pass of its own
    rows = [tensor.reshape(-1, tensor.shape[-1]).contiguous() for tensor in (gradient, x, low)]
    found = _backward(*rows, weight, down, up, ctx.scale, wanted)
    of_x, of_down, of_up = (one if asked else None for one, asked in zip(found, wanted, strict=True))
    return None if of_x is None else of_x.view(x.shape), *(None for _ in weight), None, of_down, of_up, None


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

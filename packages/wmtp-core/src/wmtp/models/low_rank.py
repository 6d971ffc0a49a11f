"""Linear maps with low-rank adapters, W·x + s·B·A·x, as one operator.

As two products and a sum, activation checkpointing that keeps products would keep both in place of their sum, and so more than
no checkpointing at all. As one, the sum alone is kept, with A·x of rank r; and the sum takes no pass of its own.

Several maps of one input are one operator too (`wmtp.models.low_rank_graph`): their matrices A are multiplied at once, and the
gradients of their input are added up by the products themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from torch import Tensor

from wmtp.models.quantized import dequantize

__all__ = ["MAP", "OPERATORS", "adapted_linear", "joined_linear"]


@torch.library.custom_op("wmtp::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    scale: float,
    joined: bool,
) -> list[Tensor]:
    """Multiply by weights and their adapters, all in one precision.

    Args:
        x: ``[..., D]``.
        weights: ``[N, D]`` each, which never learn; or in 4 bits, as `wmtp.models.quantized.Linear4Bit` packs them.
        scales: of weights in 4 bits; otherwise none.
        biases: ``[N]`` each, or none.
        down: A of each, one below the other: ``[R, D]``.
        ups: B of each, ``[N, r]``.
        scale: s.
        joined: the results are one tensor, beside each other; without gradient. ``ups`` ends with all of them as one matrix, on
            its diagonal.

    Returns:
        ``[..., N]`` for each weight, and s·A·x ``[..., R]``, which the backward pass needs.
    """
    rows = x.reshape(-1, x.shape[-1])
    low = _scaled(rows, down.t(), scale)
    if joined:
        *ups, up = ups
        result = torch.addmm(torch.cat(list(biases)), low, up.t()) if biases else low @ up.t()
        for columns, weight in _pieces(weights, scales, ups, down, x.dtype):
            result[:, columns].addmm_(rows, weight.t())
        return [result.view(*x.shape[:-1], -1), low.view(*x.shape[:-1], -1)]
    results = []
    for index, (up, columns) in enumerate(zip(ups, _columns(ups), strict=True)):
        part = low[:, columns]
        result = torch.addmm(biases[index], part, up.t()) if biases else part @ up.t()
        # The large product comes last: it is limited by arithmetic, and adds to what it reads meanwhile. The other way round,
        # all of its result would be read and written once more.
        result.addmm_(rows, _whole(weights, scales, index, up, down, x.dtype).t())
        results.append(result.view(*x.shape[:-1], -1))
    return [*results, low.view(*x.shape[:-1], -1)]


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Multiply two matrices and a number in one pass."""
    return left.new_empty((left.shape[0], right.shape[1])).addmm_(left, right, beta=0, alpha=scale)


def _columns(ups: Sequence[Tensor]) -> list[slice]:
    """Say where each adapter's numbers are in s·A·x."""
    return [slice(*ends) for ends in pairwise(accumulate((up.shape[1] for up in ups), initial=0))]


def _whole(
    weights: Sequence[Tensor], scales: Sequence[Tensor], index: int, up: Tensor, down: Tensor, dtype: torch.dtype
) -> Tensor:
    if not scales:
        return weights[index]
    return dequantize(weights[index], scales[index], up.shape[0], down.shape[1], dtype)


def _pieces(
    weights: Sequence[Tensor], scales: Sequence[Tensor], ups: Sequence[Tensor], down: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Go through weights and the columns of their joined results.

    All at once, if they are one piece of memory.
    """
    sizes = [up.shape[0] for up in ups]
    if not scales and all(_follows(other, one) for one, other in pairwise(weights)):
        yield slice(None), weights[0].as_strided((sum(sizes), down.shape[1]), (down.shape[1], 1))
        return
    for index, ends in enumerate(pairwise(accumulate(sizes, initial=0))):
        yield slice(*ends), _whole(weights, scales, index, ups[index], down, dtype)


def _follows(other: Tensor, one: Tensor) -> bool:
    """Tell whether a matrix begins in memory where one ends."""
    if not (one.is_contiguous() and other.is_contiguous()):
        return False
    places = [tensor.untyped_storage().data_ptr() for tensor in (one, other)]
    return places[0] == places[1] and int(one.storage_offset()) + one.numel() == int(other.storage_offset())


@torch.library.custom_op("wmtp::adapted_linear_backward", mutates_args=())
def _backward(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    scale: float,
    of_input: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x and of A·x.

    Args:
        gradients: ``[T, N]`` for each weight.
        weights, scales, down, ups, scale: as for `adapted_linear`.
        of_input: that of x is wanted; it is empty otherwise.
    """
    of_low = gradients[0].new_empty((gradients[0].shape[0], down.shape[0]))
    for gradient, up, columns in zip(gradients, ups, _columns(ups), strict=True):
        of_low[:, columns].addmm_(gradient, up, beta=0, alpha=scale)
    if not of_input:
        return of_low.new_empty(0), of_low
    of_x = of_low @ down
    for index, (gradient, up) in enumerate(zip(gradients, ups, strict=True)):
        of_x.addmm_(gradient, _whole(weights, scales, index, up, down, gradient.dtype))
    return of_x, of_low


@adapted_linear.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    scale: float,
    joined: bool,
) -> list[Tensor]:
    results = ups[-1:] if joined else ups
    return [x.new_empty((*x.shape[:-1], size)) for size in (*(up.shape[0] for up in results), down.shape[0])]


@_backward.register_fake
def _(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    scale: float,
    of_input: bool,
) -> tuple[Tensor, Tensor]:
    rows = gradients[0].shape[0]
    return down.new_empty((rows, down.shape[1]) if of_input else 0), down.new_empty((rows, down.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, scales, biases, down, ups, ctx.scale, _ = inputs
    ctx.counts = len(weights), len(scales), len(biases)
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(x, output[-1], down, *ups, *weights, *scales)


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    """Pass on the gradients of x, A and B.

    Weights and biases have none.
    """
    count, scaled, biased = ctx.counts
    of_input, _, _, _, of_down, of_ups, *_ = ctx.needs_input_grad
    of_x, of_a, of_b = _gradients(ctx, gradients[:-1], of_input, of_down, of_ups)
    return of_x, [None] * count, [None] * scaled, [None] * biased, of_a, of_b, None, None


def _gradients(
    ctx: Any, gradients: Sequence[Tensor], of_input: bool, of_down: bool, of_ups: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Compute those gradients of x, A and B that are asked for."""
    count = len(of_ups)
    x, low, down, *others = ctx.saved_tensors
    ups, weights, scales = others[:count], others[count : 2 * count], others[2 * count :]
    # as matrices already here, where a compiler sees it: what lies otherwise in memory takes no pass of its own
    rows, low, *gradients = (one.reshape(-1, one.shape[-1]).contiguous() for one in (x, low, *gradients))
    found, of_low = None, None
    if of_input or of_down:
        found, of_low = _backward(gradients, weights, scales, down, ups, ctx.scale, of_input)
    # The products for A and B are no part of that operator: a compiler can then make x again (activation checkpointing) in the
    # pass over memory that computes the gradients of what x is of.
    return (
        found.view(x.shape) if of_input and found is not None else None,
        of_low.t() @ rows if of_down and of_low is not None else None,
        [
            gradient.t() @ low[:, columns] if asked else None
            for gradient, columns, asked in zip(gradients, _columns(ups), of_ups, strict=True)
        ],
    )


class _Joined(torch.autograd.Function):
    """Several maps whose results are parts of one tensor.

    An operator may not return such parts; and as one result its gradient would be one tensor too, which the gradients of the
    parts would be copied into.
    """

    @staticmethod
    def forward(ctx: Any, counts: tuple[int, int, int], scale: float, x: Tensor, down: Tensor, *others: Tensor) -> Any:
        ends = list(accumulate(counts))
        ups, weights, scales, biases = (
            others[slice(*places)] for places in pairwise([0, counts[0], *(counts[0] + end for end in ends)])
        )
        # made here, where a compiler sees it: it takes one launch
        result, low = MAP(x, weights, scales, biases, down, [*ups, torch.block_diag(*ups)], scale, True)
        ctx.scale, ctx.count = scale, len(ups)
        ctx.save_for_backward(x, low, down, *ups, *weights, *scales)
        return result.split([up.shape[0] for up in ups], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        _, _, of_input, of_down, *others = ctx.needs_input_grad
        of_x, of_a, of_b = _gradients(ctx, gradients, of_input, of_down, others[: ctx.count])
        return None, None, of_x, of_a, *of_b, *[None] * (len(others) - ctx.count)


def joined_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    scale: float,
) -> Sequence[Tensor]:
    """Multiply as `adapted_linear` does, with results that are parts of one tensor.

    It takes fewer and faster products; all of the tensor is in memory as long as any part of it is.
    """
    counts = len(weights), len(scales), len(biases)
    return _Joined.apply(counts, scale, x, down, *ups, *weights, *scales, *biases)


adapted_linear.register_autograd(_differentiate, setup_context=_keep)

MAP: Final = torch.ops.wmtp.adapted_linear.default
#: products with weights that never learn, whose results activation checkpointing keeps with those of other products
OPERATORS: Final = frozenset({MAP, torch.ops.wmtp.linear_4bit.default})

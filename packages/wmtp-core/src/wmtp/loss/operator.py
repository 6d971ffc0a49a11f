"""Operator by which torch.compile sees the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.loss.cross_entropy import Answer, HeadLayout, Problem, solve

__all__ = ["solve_by_operator"]


def solve_by_operator(problem: Problem) -> Answer:
    """Compute a problem by the operator, which torch.compile keeps whole."""
    heads = problem.heads
    losses, lse, entropy, broken, gradients = _operator(
        list(problem.tensors),
        problem.ids,
        problem.valid,
        problem.coefficients,
        problem.lse,
        [head.weight for head in heads],
        [-1 if head.bias is None else head.bias for head in heads],
        [head.scale for head in heads],
        [0.0 if head.softcap is None else head.softcap for head in heads],
        [problem.wants(place) for place in range(len(problem.tensors))],
        problem.compute,
        problem.at_most,
        None if problem.valid_counts is None else list(problem.valid_counts),
        problem.entropy,
        problem.top_k,
    )
    found = iter(gradients)
    return Answer(
        losses=losses,
        lse=lse,
        entropy=entropy if problem.entropy else None,
        gradients=[next(found) if problem.wants(place) else None for place in range(len(problem.tensors))],
        broken=broken,
    )


@torch.library.custom_op("wmtp::weighted_cross_entropy", mutates_args=())
def _operator(
    tensors: list[Tensor],
    ids: Tensor,
    valid: Tensor,
    coefficients: Tensor | None,
    lse: Tensor | None,
    weights: list[int],
    biases: list[int],
    scales: list[float],
    softcaps: list[float],
    wanted: list[bool],
    compute: torch.dtype,
    at_most: int | None,
    valid_counts: list[int] | None,
    entropy: bool,
    top_k: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    heads = [
        HeadLayout(weight, None if bias < 0 else bias, scale, softcap or None)
        for weight, bias, scale, softcap in zip(weights, biases, scales, softcaps, strict=True)
    ]
    answer = solve(
        Problem(
            tensors=tensors,
            heads=heads,
            ids=ids,
            valid=valid,
            compute=compute,
            coefficients=coefficients,
            wanted=wanted,
            lse=lse,
            at_most=at_most,
            valid_counts=valid_counts,
            entropy=entropy,
            top_k=top_k,
        )
    )
    losses = answer.losses.contiguous()
    return (
        losses,
        answer.lse.clone(memory_format=torch.contiguous_format),
        losses.new_zeros(0) if answer.entropy is None else answer.entropy.contiguous(),
        ids.new_zeros((), dtype=torch.bool) if answer.broken is None else answer.broken,
        [gradient for gradient in answer.gradients if gradient is not None],
    )


@_operator.register_fake
def _(
    tensors: list[Tensor],
    ids: Tensor,
    valid: Tensor,
    coefficients: Tensor | None,
    lse: Tensor | None,
    weights: list[int],
    biases: list[int],
    scales: list[float],
    softcaps: list[float],
    wanted: list[bool],
    compute: torch.dtype,
    at_most: int | None,
    valid_counts: list[int] | None,
    entropy: bool,
    top_k: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    exact = torch.promote_types(compute, torch.float32)
    losses = tensors[0].new_empty(ids.shape, dtype=exact)
    gradients = [
        tensor.new_empty(tensor.shape, dtype=tensor.dtype if place < len(weights) else exact)
        for place, tensor in enumerate(tensors)
        if wanted[place]
    ]
    return (
        losses,
        torch.empty_like(losses),
        torch.empty_like(losses) if entropy else losses.new_empty(0),
        ids.new_empty((), dtype=torch.bool),
        gradients,
    )

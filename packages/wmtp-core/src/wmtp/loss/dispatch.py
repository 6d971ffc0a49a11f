"""Which implementation computes a problem, and the operator by which torch.compile sees either."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from wmtp.loss.spec import Answer, HeadLayout, Problem
from wmtp.loss.torch_backend import plain

__all__ = ["implementation", "scaled", "solve"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def implementation(device: torch.device, compute: torch.dtype) -> str:
    """Which implementation computes there: ``fused`` (CUDA and ROCm, where Triton is installed) or ``plain``."""
    able = device.type == "cuda" and _HAS_TRITON and compute in (torch.bfloat16, torch.float16, torch.float32)
    return "fused" if able else "plain"


def solve(problem: Problem) -> Answer:
    """Compute token losses, and gradients where they are wanted."""
    if torch.compiler.is_compiling():
        return _through_operator(problem)
    with torch.no_grad(), torch.autocast(problem.ids.device.type, enabled=False):
        if implementation(problem.ids.device, problem.compute) == "plain":
            return plain.compute(problem)
        from wmtp.loss.triton import fused  # imports Triton

        return fused.compute(problem)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, may_change: bool) -> Tensor:
    """``gradient · factor`` in a precision.

    Args:
        gradient: of `Answer`.
        factor: scalar, on the same device.
        dtype: of what is returned.
        may_change: ``gradient`` is not needed again.
    """
    if torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    if implementation(gradient.device, gradient.dtype) == "fused":
        from wmtp.loss.triton import fused

        return fused.scaled(gradient, factor, dtype, may_change)
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return gradient.to(dtype, copy=not may_change)
    factor = factor.to(gradient.dtype)
    if may_change and gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _through_operator(problem: Problem) -> Answer:
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

"""The loss in plain PyTorch, on any device.

The rows of a chunk are picked with `Tensor.nonzero`, which waits for the device where that is not the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.loss.problem import Answer, HeadLayout, Problem

__all__ = ["compute"]

#: bytes of fp32 logits that are held at once
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


def compute(problem: Problem) -> Answer:
    """See `Problem` and `Answer`."""
    horizon = problem.ids.shape[1]
    cast, exact, coefficients = problem.cast(), problem.exact, problem.coefficients
    tensors = [tensor.detach() for tensor in problem.tensors]
    losses = torch.zeros(problem.ids.shape, dtype=exact, device=problem.ids.device)
    lse = torch.zeros_like(losses) if problem.lse is None else problem.lse
    entropies = torch.zeros_like(losses) if problem.entropy else None
    gradients: list[Tensor | None] = [
        torch.zeros_like(t, dtype=t.dtype if i < horizon else exact) if problem.wants(i) else None
        for i, t in enumerate(tensors)
    ]
    counts = torch.zeros_like(problem.valid) if coefficients is None else coefficients != 0
    measured = problem.valid & ~counts
    # asked for before anything is computed: each of these waits until the device has nothing to do
    rows = [(_rows(counts[:, k]), _rows(measured[:, k])) for k in range(horizon)]
    for k, head in enumerate(problem.heads):
        learned, only_measured = (group.split(_chunk_rows(tensors[head.weight])) for group in rows[k])
        learns = problem.wants(k) or problem.wants(head.weight) or problem.wants(head.bias)
        for index in learned:
            hidden = tensors[k][index].to(problem.compute)
            target = problem.ids[index, k]
            logits = _logits(hidden, cast, head, exact)
            if problem.lse is None:
                losses[index, k], normaliser = _cross_entropy(logits, target)
                lse[index, k] = normaliser
            else:
                normaliser = lse[index, k]
            if not learns or coefficients is None:
                continue
            slope: Tensor | float = head.scale
            if head.softcap is not None:
                slope = (1 - (logits / head.softcap).square_()).mul_(head.scale)
            # d CE / d logits = softmax − onehot
            delta = logits.sub_(normaliser.unsqueeze(1)).exp_()
            delta.scatter_add_(1, target.unsqueeze(1), delta.new_full((len(index), 1), -1.0))
            delta.mul_(coefficients[index, k].to(exact).unsqueeze(1)).mul_(slope)
            if head.bias is not None and (gradient := gradients[head.bias]) is not None:
                gradient += delta.sum(0)
            delta = delta.to(problem.compute)
            if (gradient := gradients[k]) is not None:
                gradient[index] = (delta @ cast[head.weight]).to(gradient.dtype)
            if (gradient := gradients[head.weight]) is not None:
                _add_product(gradient, delta, hidden)
        if problem.lse is not None:
            continue
        for index in only_measured:
            logits = _logits(tensors[k][index].to(problem.compute), cast, head, exact)
            losses[index, k], normaliser = _cross_entropy(logits, problem.ids[index, k])
            lse[index, k] = normaliser
            if entropies is None:
                continue
            if problem.top_k is None:
                probabilities = logits.sub_(normaliser.unsqueeze(1)).exp_()
            else:
                probabilities = logits.topk(min(problem.top_k, logits.shape[1])).values.softmax(dim=1)
            entropies[index, k] = torch.special.entr(probabilities).sum(dim=1)
    return Answer(losses=losses, lse=lse, entropy=entropies, gradients=gradients)


def _rows(wanted: Tensor) -> Tensor:
    return wanted.nonzero().squeeze(1)


def _chunk_rows(weight: Tensor) -> int:
    """How many rows of logits are made at once."""
    return max(1, _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES["cuda"]) // (4 * weight.shape[0]))


def _logits(hidden: Tensor, cast: dict[int, Tensor], head: HeadLayout, exact: torch.dtype) -> Tensor:
    bias = None if head.bias is None else cast[head.bias]
    logits = torch.nn.functional.linear(hidden, cast[head.weight], bias).to(exact)
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Token losses, and the logarithm of the sum of all exponentials."""
    normaliser = torch.logsumexp(logits, dim=1)
    return normaliser - logits.gather(1, target.unsqueeze(1)).squeeze(1), normaliser


def _add_product(accumulator: Tensor, delta: Tensor, hidden: Tensor) -> None:
    """``accumulator += deltaᵀ · hidden``, added in the accumulator's precision."""
    if accumulator.dtype == delta.dtype:
        accumulator.addmm_(delta.T, hidden)
    else:
        accumulator += delta.T @ hidden

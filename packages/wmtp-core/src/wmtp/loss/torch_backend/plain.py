"""Loss in plain PyTorch, on any device.

The rows of a chunk are picked with `Tensor.nonzero`, which waits for the device where that is not the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.loss.cross_entropy import Answer, HeadLayout, Problem
from wmtp.loss.fp8 import SLOPE_FORMAT, SLOPE_RANGE, in_fp8, table_in_fp8

__all__ = ["add_product", "compute", "logits_of", "rows_of", "transformed"]

#: bytes of fp32 logits that are held at once
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}

#: bytes of fp32 logits that a CPU works on at once
_SLICE_BYTES = 2**20

#: bytes of an unembedding's gradient that a CPU adds up at once
_SUM_BYTES = 4 * 2**20


def compute(problem: Problem) -> Answer:
    """See `Problem` and `Answer`."""
    horizon = problem.ids.shape[1]
    cast, exact, coefficients = problem.cast(), problem.exact, problem.coefficients
    factors = cast  # of the logits
    if problem.fp8 is not None:
        tables = {head.weight: head.softcap is None for head in problem.heads}
        factors = cast | {place: table_in_fp8(cast[place], centered=centered) for place, centered in tables.items()}
    tensors = [tensor.detach() for tensor in problem.tensors]
    losses = torch.zeros(problem.ids.shape, dtype=exact, device=problem.ids.device)
    lse = torch.zeros_like(losses) if problem.lse is None else problem.lse
    entropies = torch.zeros_like(losses) if problem.entropy else None
    gradients: list[Tensor | None] = [
        torch.zeros_like(t, dtype=t.dtype if i < horizon else exact) if problem.wants(i) else None
        for i, t in enumerate(tensors)
    ]
    counts = torch.zeros_like(problem.valid) if coefficients is None else coefficients != 0
    measured = problem.valid & ~counts if problem.lse is None else torch.zeros_like(counts)
    # asked for before anything is computed: each of these waits until the device has nothing to do
    rows = [(rows_of(counts[:, k]), rows_of(measured[:, k])) for k in range(horizon)]
    for k, head in enumerate(problem.heads):
        learns = problem.wants(k) or problem.wants(head.weight) or problem.wants(head.bias)
        size = _chunk_rows(tensors[head.weight])
        for group, has_coefficients in zip(rows[k], (True, False), strict=True):
            for index in group.split(size) if len(group) else ():
                hidden = tensors[k][index].to(problem.compute)
                delta = logits_of(hidden if problem.fp8 is None else in_fp8(hidden), factors, head)
                # in slices that stay in a CPU's cache through all the passes over them
                step = max(1, _SLICE_BYTES // (4 * delta.shape[1])) if delta.device.type == "cpu" else len(delta)
                for start in range(0, len(delta), step):
                    part = slice(start, start + step)
                    at = index[part]
                    found = _Softmax(delta[part].to(exact), head, problem.ids[at, k])
                    c = None
                    if learns and has_coefficients and coefficients is not None:
                        c = coefficients[at, k].to(exact)
                    if c is None and problem.lse is None:
                        losses[at, k], lse[at, k] = found.measure()
                        if entropies is not None:
                            entropies[at, k] = found.entropy(problem.top_k)
                    elif c is not None:
                        if problem.lse is None:
                            slope, losses[at, k], lse[at, k] = found.measure_and_differentiate(c)
                        else:
                            slope = found.differentiate(c, lse[at, k])
                        if head.bias is not None and (gradient := gradients[head.bias]) is not None:
                            gradient += slope.sum(0)
                        delta[part] = slope
                if not (learns and has_coefficients):
                    continue
                if (gradient := gradients[k]) is not None:
                    if problem.fp8 is None or not problem.fp8.gradient or coefficients is None:
                        gradient[index] = (delta @ cast[head.weight]).to(gradient.dtype)
                    else:
                        scales = coefficients[index, k].to(exact).unsqueeze(1) * head.scale
                        slopes = _slopes_in_fp8(delta, scales)
                        gradient[index] = ((slopes @ factors[head.weight]) * scales).to(gradient.dtype)
                if (gradient := gradients[head.weight]) is not None:
                    add_product(gradient, delta, hidden)
    return Answer(losses=losses, lse=lse, entropy=entropies, gradients=gradients)


def _slopes_in_fp8(delta: Tensor, scales: Tensor) -> Tensor:
    """Divide the gradients of logits by their rows' coefficients, and round them."""
    wide = (delta.to(scales.dtype) * (SLOPE_RANGE / scales)).to(SLOPE_FORMAT)
    return wide.to(delta.dtype) / SLOPE_RANGE


class _Softmax:
    """Some rows of logits ``[n, V]``, changed in place, and targets ``[n]``."""

    def __init__(self, logits: Tensor, head: HeadLayout, target: Tensor) -> None:
        self._head, self._target = head, target.unsqueeze(1)
        self._logits = transformed(logits, head)

    def measure(self) -> tuple[Tensor, Tensor]:
        """Token losses, and the logarithms of the sums of all exponentials."""
        highest = self._logits.amax(dim=1, keepdim=True)
        lse = (self._logits - highest).exp_().sum(dim=1).log_() + highest.squeeze(1)
        return lse - self._logits.gather(1, self._target).squeeze(1), lse

    def entropy(self, top_k: int | None) -> Tensor:
        """Over the ``top_k`` most probable tokens, or all."""
        top = self._logits if top_k is None else self._logits.topk(min(top_k, self._logits.shape[1])).values
        return torch.special.entr(top.softmax(dim=1)).sum(dim=1)

    def measure_and_differentiate(self, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what `measure` gives, and turn the logits into their gradient.

        In place: c · (softmax − onehot), through scale and cap.
        """
        at_target, slope = self._logits.gather(1, self._target), self._slope()
        highest = self._logits.amax(dim=1, keepdim=True)
        exponentials = self._logits.sub_(highest).exp_()
        total = exponentials.sum(dim=1, keepdim=True)
        lse = total.log() + highest
        return self._delta(exponentials, coefficients, total, slope), (lse - at_target).squeeze(1), lse.squeeze(1)

    def differentiate(self, coefficients: Tensor, lse: Tensor) -> Tensor:
        """Compute the gradient of the logits alone, from a known log-sum-exp."""
        slope = self._slope()
        probabilities = self._logits.sub_(lse.unsqueeze(1)).exp_()
        return self._delta(probabilities, coefficients, torch.ones_like(lse).unsqueeze(1), slope)

    def _slope(self) -> Tensor | None:
        cap = self._head.softcap
        return None if cap is None else 1 - (self._logits / cap).square_()

    def _delta(self, exponentials: Tensor, coefficients: Tensor, total: Tensor, slope: Tensor | None) -> Tensor:
        factor = (coefficients * self._head.scale).unsqueeze(1)
        delta = exponentials.mul_(factor / total)
        delta.scatter_add_(1, self._target, -factor)
        return delta if slope is None else delta.mul_(slope)


def transformed(logits: Tensor, head: HeadLayout) -> Tensor:
    """Scale and cap logits in place."""
    if head.scale != 1.0:
        logits = logits.mul_(head.scale)
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def rows_of(wanted: Tensor) -> Tensor:
    """List the places that are wanted.

    Waits for a device that is not the CPU.
    """
    return wanted.nonzero().squeeze(1)


def _chunk_rows(weight: Tensor) -> int:
    """Number of rows of logits per chunk."""
    return max(1, _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES["cuda"]) // (4 * weight.shape[0]))


def logits_of(hidden: Tensor, cast: dict[int, Tensor], head: HeadLayout) -> Tensor:
    """Multiply hidden states with a head's unembedding, before scale and cap."""
    return torch.nn.functional.linear(hidden, cast[head.weight], None if head.bias is None else cast[head.bias])


def add_product(accumulator: Tensor, delta: Tensor, hidden: Tensor) -> None:
    """``accumulator += deltaᵀ · hidden``, added in the accumulator's precision."""
    if accumulator.dtype == delta.dtype:
        accumulator.addmm_(delta.T, hidden)
        return
    # on a CPU in slices: a product of another precision and its sum would be tensors of the whole size, whose memory
    # takes longer to get than they take to compute
    step = max(1, _SUM_BYTES // (4 * hidden.shape[1])) if delta.device.type == "cpu" else len(accumulator)
    for start in range(0, len(accumulator), step):
        accumulator[start : start + step] += delta[:, start : start + step].T @ hidden

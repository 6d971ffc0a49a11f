"""The weighted cross entropy of H heads, never holding more than a chunk of logits.

    L = Σ_i Σ_k c[i, k] · CE(logits_k(h_k[i]), x[i, k])

with coefficients c that already hold head weight, token weight and normaliser. The gradient of the hidden states and of the
unembedding is computed together with the loss, chunk by chunk, so the logits of a chunk are made once and kept nowhere.
A prediction whose coefficient is 0 costs its logits at most, and no product of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

__all__ = ["Unembedding", "token_losses", "token_statistics", "weighted_cross_entropy"]

#: bytes of fp32 logits that are held at once
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


@frozen(kw_only=True, eq=False)
class Unembedding:
    """From hidden states to logits: ``softcap(scale · (hidden @ weight.T + bias))``.

    Args:
        weight: ``[V, D]``.
        bias: ``[V]`` or None.
        scale: the factor of the logits (Cohere, Granite), 1 for most models.
        softcap: c in ``c · tanh(logits / c)`` (Gemma 2); None for most models.
        divides: the model divides by ``1 / scale`` instead of multiplying, which rounds differently.
        float32: the model turns its logits into fp32 before it scales and caps them.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    divides: bool = False
    float32: bool = False

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., D]``, exactly as the model computes them."""
        return self.transform(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def transform(self, logits: Tensor) -> Tensor:
        """Scale and cap ``hidden @ weight.T + bias``."""
        if self.float32:
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits / (1.0 / self.scale) if self.divides else logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def weighted_cross_entropy(
    hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding], ids: Tensor, coefficients: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted loss of all heads, and the token losses.

    Args:
        hidden: one ``[…, D]`` a head, each what that head's unembedding multiplies.
        unembeddings: one a head; heads may share one, whose gradient is then accumulated once, in fp32.
        ids: ``[…, H]`` int64, the targets.
        coefficients: ``[…, H]``, without gradient; 0 where a prediction does not count.
        valid: ``[…, H]`` bool, the predictions whose token loss is wanted. Must include every non-zero coefficient; where
            the token losses are known already, ``coefficients != 0`` saves the logits of the others too.

    Returns:
        the loss, a scalar with gradient; and the token losses ``[…, H]`` fp32, detached, 0 where not valid.
    """
    horizon = ids.shape[-1]
    shared, tensors = _flatten(hidden, unembeddings)
    loss, losses = _WeightedCrossEntropy.apply(
        ids.reshape(-1, horizon),
        coefficients.detach().reshape(-1, horizon),
        valid.reshape(-1, horizon),
        shared,
        torch.is_grad_enabled(),
        *tensors,
    )
    return loss, losses.view(ids.shape)


def token_losses(hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding], ids: Tensor, valid: Tensor) -> Tensor:
    """The cross entropy of every valid prediction, without gradient.

    Args:
        hidden: one ``[…, D]`` a head.
        unembeddings: one a head.
        ids: ``[…, H]`` int64, the targets.
        valid: ``[…, H]`` bool.

    Returns:
        ``[…, H]`` fp32 (fp64 for fp64 hidden states), 0 where not valid.
    """
    return token_statistics(hidden, unembeddings, ids, valid)[0]


@torch.no_grad()
def token_statistics(
    hidden: Sequence[Tensor],
    unembeddings: Sequence[Unembedding],
    ids: Tensor,
    valid: Tensor,
    *,
    entropy: bool = False,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The cross entropy of every valid prediction, and the entropy of what was predicted; without gradient.

    Args:
        hidden: one ``[…, D]`` a head.
        unembeddings: one a head.
        ids: ``[…, H]`` int64, the targets.
        valid: ``[…, H]`` bool.
        entropy: whether the entropy is wanted.
        top_k: take it over the ``top_k`` most probable tokens, whose probabilities are made to add up to 1; None: over all.

    Returns:
        the token losses and the entropy in nats (None if not wanted), each ``[…, H]`` fp32 (fp64 for fp64 hidden states), 0
        where not valid.
    """
    horizon = ids.shape[-1]
    shared, tensors = _flatten([h.detach() for h in hidden], unembeddings)
    compute, exact = _precision(tensors[0])
    cast = _cast(shared, tensors, compute)
    targets, wanted = ids.reshape(-1, horizon), valid.reshape(-1, horizon)
    losses = torch.zeros(targets.shape, dtype=exact, device=ids.device)
    entropies = torch.zeros_like(losses) if entropy else None
    with torch.autocast(ids.device.type, enabled=False):
        for k, (unembedding, weight, bias) in enumerate(shared):
            for index in _rows(wanted[:, k]).split(_chunk_rows(tensors[weight])):
                logits = _logits(tensors[k][index].to(compute), cast, unembedding, weight, bias, exact)
                losses[index, k], normaliser = _cross_entropy(logits, targets[index, k])
                if entropies is None:
                    continue
                if top_k is None:
                    probabilities = logits.sub_(normaliser.unsqueeze(1)).exp_()
                else:
                    probabilities = logits.topk(min(top_k, logits.shape[1])).values.softmax(dim=1)
                entropies[index, k] = torch.special.entr(probabilities).sum(dim=1)
    return losses.view(ids.shape), None if entropies is None else entropies.view(ids.shape)


def _flatten(
    hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding]
) -> tuple[list[tuple[Unembedding, int, int | None]], list[Tensor]]:
    """List all tensors once, for autograd; say for each head where its weight and bias stand in the list."""
    tensors = [h.reshape(-1, h.shape[-1]) for h in hidden]
    place: dict[tuple[bool, int], int] = {}
    shared: list[tuple[Unembedding, int, int | None]] = []

    def add(tensor: Tensor) -> int:
        # detached aliases of one weight are different objects
        key = (True, id(tensor)) if tensor.requires_grad else (False, tensor.data_ptr())
        if key not in place:
            place[key] = len(tensors)
            tensors.append(tensor)
        return place[key]

    for unembedding in unembeddings:
        bias = None if unembedding.bias is None else add(unembedding.bias)
        shared.append((unembedding, add(unembedding.weight), bias))
    return shared, tensors


def _precision(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What products are computed in, and what logits become before anything is added up."""
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return compute, torch.promote_types(compute, torch.float32)


def _cast(
    shared: Sequence[tuple[Unembedding, int, int | None]], tensors: Sequence[Tensor], dtype: torch.dtype
) -> dict[int, Tensor]:
    """Every weight and bias once, in the precision of the products, by its place in the list."""
    return {place: tensors[place].to(dtype) for _, *places in shared for place in places if place is not None}


def _rows(wanted: Tensor) -> Tensor:
    return wanted.nonzero().squeeze(1)


def _chunk_rows(weight: Tensor) -> int:
    """How many rows of logits are made at once."""
    return max(1, _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES["cuda"]) // (4 * weight.shape[0]))


def _logits(
    hidden: Tensor, cast: dict[int, Tensor], unembedding: Unembedding, weight: int, bias: int | None, exact: torch.dtype
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, cast[weight], None if bias is None else cast[bias]).to(exact)
    if unembedding.scale != 1.0:
        logits *= unembedding.scale
    if unembedding.softcap is not None:
        logits = logits.div_(unembedding.softcap).tanh_().mul_(unembedding.softcap)
    return logits


def _cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Token losses, and the logarithm of the sum of all exponentials."""
    normaliser = torch.logsumexp(logits, dim=1)
    return normaliser - logits.gather(1, target.unsqueeze(1)).squeeze(1), normaliser


class _WeightedCrossEntropy(torch.autograd.Function):
    """Computes the gradients for an upstream gradient of 1 in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        ids: Tensor,
        coefficients: Tensor,
        valid: Tensor,
        shared: list[tuple[Unembedding, int, int | None]],
        with_gradient: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        horizon = ids.shape[1]
        compute, exact = _precision(tensors[0])
        cast = _cast(shared, tensors, compute)
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[5:]]
        gradients: list[Tensor | None] = [
            torch.zeros_like(t, dtype=t.dtype if i < horizon else exact) if wanted[i] else None for i, t in enumerate(tensors)
        ]
        losses = torch.zeros(ids.shape, dtype=exact, device=ids.device)
        counts = valid & (coefficients != 0)
        # asked for before anything is computed: on a GPU each of these waits until the device has nothing to do
        rows = [(_rows(counts[:, k]), _rows(valid[:, k] & ~counts[:, k])) for k in range(horizon)]
        with torch.autocast(ids.device.type, enabled=False):
            for k, (unembedding, weight, bias) in enumerate(shared):
                learned, only_measured = (group.split(_chunk_rows(tensors[weight])) for group in rows[k])
                learns = wanted[k] or wanted[weight] or (bias is not None and wanted[bias])
                for index in learned:
                    h = tensors[k][index].to(compute)
                    target = ids[index, k]
                    logits = _logits(h, cast, unembedding, weight, bias, exact)
                    losses[index, k], normaliser = _cross_entropy(logits, target)
                    if not learns:
                        continue
                    slope: Tensor | float = unembedding.scale
                    if unembedding.softcap is not None:
                        slope = (1 - (logits / unembedding.softcap).square_()).mul_(unembedding.scale)
                    # d CE / d logits = softmax − onehot
                    delta = logits.sub_(normaliser.unsqueeze(1)).exp_()
                    delta.scatter_add_(1, target.unsqueeze(1), delta.new_full((len(index), 1), -1.0))
                    delta.mul_(coefficients[index, k].to(exact).unsqueeze(1)).mul_(slope)
                    if bias is not None and (gradient := gradients[bias]) is not None:
                        gradient += delta.sum(0)
                    delta = delta.to(compute)
                    if (gradient := gradients[k]) is not None:
                        gradient[index] = (delta @ cast[weight]).to(gradient.dtype)
                    if (gradient := gradients[weight]) is not None:
                        _add_product(gradient, delta, h)
                for index in only_measured:
                    logits = _logits(tensors[k][index].to(compute), cast, unembedding, weight, bias, exact)
                    losses[index, k], _ = _cross_entropy(logits, ids[index, k])
        ctx.gradients = [None if g is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]
        ctx.mark_non_differentiable(losses)
        # NaN · 0 is NaN: an infinite token loss must show in the loss only where it counts
        counted = torch.where(coefficients != 0, losses * coefficients.to(exact), 0.0)
        return counted.sum(), losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the gradient of weighted_cross_entropy can be taken once: it is kept nowhere after that")
        gradients = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return None, None, None, None, None, *gradients


def _add_product(accumulator: Tensor, delta: Tensor, hidden: Tensor) -> None:
    """``accumulator += deltaᵀ · hidden``, added in the accumulator's precision."""
    if accumulator.dtype == delta.dtype:
        accumulator.addmm_(delta.T, hidden)
    else:
        accumulator += delta.T @ hidden

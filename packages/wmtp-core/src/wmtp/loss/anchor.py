"""KL divergence from another model, without logits of all positions.

    D[i] = KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)      p: the other model's, without gradient

The gradient of each D[i] by its own logits is q − p. What a caller makes of D is not known before the backward pass, so logits
are made again there, chunk by chunk, and kept nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wmtp.loss.cross_entropy import HeadLayout, precision
from wmtp.loss.torch_backend import plain
from wmtp.loss.unembedding import Unembedding

__all__ = ["divergence_from"]

#: bytes of fp32 logits of one model that are held at once
_CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 192 * 2**20}


def divergence_from(other: tuple[Tensor, Unembedding], hidden: Tensor, unembedding: Unembedding, valid: Tensor) -> Tensor:
    """Compute KL(p ‖ q) of each prediction.

    It carries gradients by ``hidden`` and ``unembedding``.

    Args:
        other: hidden states ``[…, D']`` and unembedding of the other model, for p; they get no gradient.
        hidden: ``[…, D]``, for q.
        unembedding: ``[V, D]``, bias, scale, soft-cap.
        valid: ``[…]`` bool; elsewhere hidden states may hold anything.

    Returns:
        ``[…]`` fp32 (fp64 for fp64 hidden states), in nats, 0 where not valid.
    """
    states, theirs = other
    found = _Divergence.apply(
        valid.reshape(-1),
        (states.detach().reshape(-1, states.shape[-1]), theirs.weight.detach(), _detached(theirs.bias), theirs),
        unembedding,
        precision(hidden),
        hidden.reshape(-1, hidden.shape[-1]),
        unembedding.weight,
        unembedding.bias,
    )
    return found.reshape(valid.shape)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        valid: Tensor,
        other: tuple[Tensor, Tensor, Tensor | None, Unembedding],
        form: Unembedding,
        compute: torch.dtype,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.other, ctx.form, ctx.compute = other, form, compute
        ctx.save_for_backward(valid, hidden, weight, bias)
        exact = torch.promote_types(compute, torch.float32)
        out = torch.zeros(valid.shape, dtype=exact, device=valid.device)
        with torch.autocast(valid.device.type, enabled=False):
            for rows in _chunks(valid, weight):
                log_p, log_q, _, _ = _distributions(ctx, rows, valid, hidden, weight, bias)
                p = log_p.exp()
                # a probability of 0 adds nothing, and 0 · ∞ would be NaN
                kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=1)
                out[rows] = torch.where(valid[rows], kl, 0.0)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        valid, hidden, weight, bias = ctx.saved_tensors
        _, _, _, _, wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad
        exact = torch.promote_types(ctx.compute, torch.float32)
        by_hidden = torch.zeros_like(hidden) if wants_hidden else None
        by_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        by_bias = torch.zeros_like(bias, dtype=exact) if wants_bias and bias is not None else None
        form: Unembedding = ctx.form
        with torch.autocast(valid.device.type, enabled=False):
            for rows in _chunks(valid, weight):
                log_p, log_q, states, through = _distributions(ctx, rows, valid, hidden, weight, bias)
                factor = torch.where(valid[rows], upstream[rows].to(exact), 0.0).unsqueeze(1) * form.scale
                slope = (log_q.exp() - log_p.exp()).mul_(factor)
                if through is not None:
                    slope *= through
                if by_bias is not None:
                    by_bias += slope.sum(0)
                slope = slope.to(ctx.compute)
                if by_hidden is not None:
                    by_hidden[rows] = (slope @ weight.to(ctx.compute)).to(hidden.dtype)
                if by_weight is not None:
                    plain.add_product(by_weight, slope, states)
        return (
            None, None, None, None, by_hidden,
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_bias is None or bias is None else by_bias.to(bias.dtype),
        )  # fmt: skip


def _distributions(
    ctx: Any, rows: slice, valid: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute log p and log q of a chunk.

    Returned with q's hidden states and the derivative of its soft-cap, if there is one.
    """
    other_hidden, other_weight, other_bias, theirs = ctx.other
    log_p, _, _ = _log_softmax(other_hidden[rows], other_weight, other_bias, theirs, valid[rows], other_weight.dtype)
    log_q, states, through = _log_softmax(hidden[rows], weight, bias, ctx.form, valid[rows], ctx.compute)
    return log_p.to(log_q.device, log_q.dtype), log_q, states, through


def _log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, form: Unembedding, valid: Tensor, compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    device = weight.device
    states = torch.where(valid.to(hidden.device).unsqueeze(1), hidden, 0.0).to(device, compute)
    logits = torch.nn.functional.linear(states, weight.to(compute), None if bias is None else bias.to(compute))
    z = plain.transformed(logits.to(torch.promote_types(compute, torch.float32)), HeadLayout(0, None, form.scale, form.softcap))
    through = None if form.softcap is None else 1 - (z / form.softcap).square_()
    return z.log_softmax(dim=1), states, through


def _chunks(valid: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, _CHUNK_BYTES.get(valid.device.type, _CHUNK_BYTES["cuda"]) // (4 * weight.shape[0]))
    return [slice(start, min(start + size, len(valid))) for start in range(0, len(valid), size)]


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()

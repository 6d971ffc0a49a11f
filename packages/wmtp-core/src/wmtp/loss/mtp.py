"""Multi-token loss from hidden states, targets and weights alone.

It is usable without the rest of WMTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import torch
from attrs import define
from torch import Tensor

from wmtp.loss.cross_entropy import TokenPass, token_pass, weighted_cross_entropy
from wmtp.loss.unembedding import Unembedding
from wmtp.loss.weights import (
    BAD_WEIGHTS,
    NO_WEIGHT,
    Normalizer,
    bad_weights,
    head_statistics,
    prediction_coefficients,
    statistics_dtype,
    weight_statistics,
)

__all__ = ["IGNORED", "MTPLoss", "mtp_loss"]

#: Target that is not to be predicted, as in `torch.nn.functional.cross_entropy`.
IGNORED = -100


@define(kw_only=True, eq=False, slots=False)
class MTPLoss:
    """Result of `mtp_loss`.

    Args:
        loss: scalar, with gradient. NaN if a weight (of a head, too) is negative, NaN or infinite, or a count that was given is
            too small.
        token_losses: ``[…, H]`` fp32 (fp64 for fp64 hidden states), detached, in nats; 0 where there is no target.
        weights: ``[…, H]`` fp32, w; 0 where there is no target.
        statistics: scalars, on the device: ``loss/head_k`` (mean token loss of a head), ``weighted_loss/head_k`` (mean by
            weight), ``weight/mean``, ``std``, ``min``, ``max``, ``ess`` = (Σw)²/Σw², ``ess_share``, ``zero_share``.
    """

    loss: Tensor
    token_losses: Tensor
    weights: Tensor
    statistics: Mapping[str, Tensor]


def mtp_loss(
    hidden: Sequence[Tensor],
    unembedding: Tensor | Unembedding | Sequence[Tensor | Unembedding],
    targets: Tensor,
    *,
    weights: Tensor | Callable[[Tensor], Tensor] | None = None,
    head_weights: Sequence[float] | Tensor | None = None,
    normalizer: Normalizer | float | Tensor = "sum_w",
    at_most: int | None = None,
    valid_counts: Sequence[int] | None = None,
) -> MTPLoss:
    """Compute the weighted multi-token loss, and its gradient, without full logits.

    L = Σ_t Σ_k α_k w[t, k] m[t, k] CE(logits_k(h_k[t]), x[t, k]) / Z. The gradient is computed together with the loss, chunk by
    chunk; that of an unembedding which several heads share is accumulated once, in fp32. With a function as ``weights`` the
    token losses of all predictions are computed first, then the gradient of those alone that have a weight.

    Args:
        hidden: H tensors ``[…, D]``, of head 1 (which predicts the next token) to head H: the inputs of the unembedding.
        unembedding: ``[V, D]``, or an `Unembedding` (bias, scale, soft-cap), or one of these for each head. One that
            requires no gradient costs no product for it.
        targets: ``[…, H]`` int64, x[t, k], the token that head k predicts at t; `IGNORED` where m[t, k] = 0.
        weights: w, ``[…, H]`` or a shape that broadcasts to it; or a function that makes it of the token losses ``[…, H]``; or
            None: 1. Finite, ≥ 0, without gradient. Values where there is no target have no effect.
        head_weights: α, H numbers; None: 1.
        normalizer: Z. ``sum_w``: Σ α w m; ``valid``: Σ α m; ``per_position``: Σ_k α w m of each position, times the number of
            positions; or Z itself, so that several calls can add up to one loss.
        at_most: how many predictions have a weight other than 0, or an upper bound, where the host knows it; see docs/loss.md.
        valid_counts: how many targets each head has, or upper bounds.

    Raises:
        TypeError: shapes that do not fit each other, or a DTensor.
        ValueError: an unknown normalizer; weights that carry a gradient or, where that can be seen without waiting for a
            device (on a CPU), are negative, NaN or infinite, those of heads too.
    """
    horizon = targets.shape[-1]
    each = [unembedding] * horizon if isinstance(unembedding, Tensor | Unembedding) else unembedding
    heads = [u if isinstance(u, Unembedding) else Unembedding(weight=u) for u in each]
    valid = targets != IGNORED
    ids = torch.where(valid, targets, 0)

    precomputed: TokenPass | None = None
    if callable(weights):
        precomputed = token_pass(hidden, heads, ids, valid, valid_counts=valid_counts)
        with torch.no_grad():
            weights = weights(precomputed.losses.clone())  # which the function may change
    w = _placed(weights, valid)
    alpha = torch.ones(horizon, device=w.device) if head_weights is None else _on_device(head_weights, w.device)
    if alpha.shape != (horizon,):
        raise TypeError(f"head_weights: {horizon} numbers are wanted, one a head, not {list(alpha.shape)}")
    learns = alpha.isfinite() & (alpha >= 0)
    flat, mask = w.reshape(1, -1, horizon), valid.reshape(1, -1, horizon)
    if isinstance(normalizer, str):
        if normalizer not in (known_ones := get_args(Normalizer)):
            raise ValueError(f"normalizer: {normalizer!r} is none of {', '.join(map(repr, known_ones))}, nor a number")
        coefficients = prediction_coefficients(flat, mask, alpha, normalizer)
    else:
        coefficients = (flat.to(statistics_dtype(w.device)) * alpha / normalizer).float()
    problem = bad_weights(flat, coefficients)
    wrong = (problem != 0) & (problem != NO_WEIGHT) | ~learns.all()
    if not w.is_cuda and not torch.compiler.is_compiling() and bool(wrong):
        if not learns.all():
            raise ValueError(f"head_weights: numbers ≥ 0 are wanted, not {alpha.tolist()}")
        raise ValueError(f"weights: {BAD_WEIGHTS[int(problem)].removeprefix('token_weights returned ')}")
    loss, losses = weighted_cross_entropy(
        hidden,
        heads,
        ids,
        coefficients.view(w.shape),
        valid,
        precomputed=precomputed,
        at_most=at_most,
        valid_counts=valid_counts,
    )
    statistics = head_statistics(losses.view(flat.shape), flat, mask) | weight_statistics(flat, mask)
    return MTPLoss(loss=torch.where(wrong, torch.nan, loss), token_losses=losses, weights=w, statistics=statistics)


def _placed(weights: Tensor | None, valid: Tensor) -> Tensor:
    if weights is None:
        return valid.float()
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: a {type(weights).__name__} is no tensor")
    if weights.requires_grad:
        raise ValueError("weights: they carry a gradient, by which the model would learn to change them; detach them")
    try:
        placed = weights.to(device=valid.device, dtype=torch.float32).expand(valid.shape)
    except RuntimeError as error:
        raise TypeError(f"weights: shape {list(weights.shape)} does not broadcast to [..., H] = {list(valid.shape)}") from error
    return torch.where(valid, placed, 0.0)


def _on_device(numbers: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    tensor = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.float32)
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()  # from elsewhere the copy would wait for the device
    return tensor.to(device, non_blocking=True)

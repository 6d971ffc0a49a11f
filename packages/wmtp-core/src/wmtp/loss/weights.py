"""Coefficients of all predictions from a trainer's weights, and statistics of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from wmtp.runs.weight_bins import BINS_PER_OCTAVE, HALF_BINS, WEIGHT_BINS

__all__ = [
    "BAD_WEIGHTS",
    "NO_WEIGHT",
    "Normalizer",
    "bad_weights",
    "head_statistics",
    "prediction_coefficients",
    "statistics_dtype",
    "weight_histogram",
    "weight_statistics",
]

Normalizer = Literal["sum_w", "valid", "per_position"]


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Pick the dtype of sums over a batch: fp64 where supported."""
    return torch.float32 if device.type == "mps" else torch.float64


def prediction_coefficients(weights: Tensor, valid: Tensor, head_weights: Tensor, normalizer: Normalizer) -> Tensor:
    """Compute the coefficients c[t, k] of the loss Σ c · CE.

    c[t, k] = α_k w[t, k] m[t, k] / Z.

    Args:
        weights: ``[B, S, H]``, of a whole optimizer step, 0 where not valid.
        valid: ``[B, S, H]`` bool, m.
        head_weights: ``[H]``, α.
        normalizer: ``sum_w``: Z = Σ α w m; ``valid``: Z = Σ α m; ``per_position``: Σ_k α_k w m of each position, times the
            number of positions, as an older implementation did.

    Returns:
        ``[B, S, H]`` fp32; 0 everywhere if Z is 0.
    """
    weighted = weights.to(statistics_dtype(weights.device)) * head_weights
    if normalizer == "sum_w":
        total = weighted.sum()
    elif normalizer == "valid":
        total = (valid * head_weights).sum()
    else:
        at_position = weighted.sum(dim=-1, keepdim=True)
        total = at_position * (at_position > 0).sum()
    return torch.where(total > 0, weighted / total, 0.0).float()


#: what `bad_weights` can find
NO_WEIGHT = 3
BAD_WEIGHTS = {
    1: "token_weights returned NaN or infinite weights",
    2: "token_weights returned negative weights",
    NO_WEIGHT: "every prediction of the step has weight 0, so there is nothing to learn",
}


def bad_weights(weights: Tensor, coefficients: Tensor) -> Tensor:
    """Return 0 for allowed weights, else a key of `BAD_WEIGHTS`.

    Args:
        weights: ``[B, S, H]``.
        coefficients: ``[B, S, H]``, made from them.

    Returns:
        scalar int64, on the device, so that it can be read a step late.
    """
    code = torch.where((coefficients == 0).all(), NO_WEIGHT, 0)
    code = torch.where((weights < 0).any(), 2, code)
    return torch.where(weights.isfinite().all(), code, 1)


def weight_statistics(weights: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Summarize w over the valid predictions of a step.

    Args:
        weights: ``[B, S, H]``, 0 where not valid.
        valid: ``[B, S, H]`` bool.

    Returns:
        mean, std, min, max; ``ess`` = (Σw)² / Σw², the effective number of predictions; ``ess_share`` = ess / number of valid
        predictions; ``zero_share``, the share with weight 0.
    """
    if not weights.numel():  # no rows count as one row without predictions
        weights, valid = weights.new_zeros(1), valid.new_zeros(1)
    w = weights.to(statistics_dtype(weights.device))
    count = valid.sum().to(w.dtype)
    mean = w.sum() / count
    square = w.square().sum()
    ess = w.sum().square() / square
    return {
        "weight/mean": mean,
        "weight/std": ((w - mean).square() * valid).sum().div(count).sqrt(),
        "weight/min": torch.where(valid, w, torch.inf).min(),
        "weight/max": torch.where(valid, w, -torch.inf).max(),
        "weight/ess": ess,
        "weight/ess_share": ess / count,
        "weight/zero_share": ((weights == 0) & valid).sum() / count,
    }


def weight_histogram(weights: Tensor, valid: Tensor) -> Tensor:
    """Count each head's valid predictions by weight, in `WEIGHT_BINS`.

    Args:
        weights: ``[B, S, H]``.
        valid: ``[B, S, H]`` bool.

    Returns:
        ``[H, len(WEIGHT_BINS)]`` int64, on the device of the weights; nothing waits for the device.
    """
    horizon, bins = weights.shape[-1], len(WEIGHT_BINS)
    place = (weights.float().log2() * BINS_PER_OCTAVE).nan_to_num(nan=0.0).round().clamp(-HALF_BINS - 1, HALF_BINS + 1)
    index = torch.where(weights > 0, place.to(torch.int64) + HALF_BINS + 2, 0)
    index += torch.arange(horizon, device=index.device) * bins
    counts = torch.zeros(horizon * bins, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index.flatten(), valid.flatten().to(torch.int64)).view(horizon, bins)


def head_statistics(losses: Tensor, weights: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Average each head's token losses, plainly and by weight.

    NaN for a head without predictions.

    Args:
        losses: ``[B, S, H]``, 0 where not valid.
        weights: ``[B, S, H]``, 0 where not valid.
        valid: ``[B, S, H]`` bool.
    """
    over = (0, 1)
    dtype = statistics_dtype(losses.device)
    plain = losses.to(dtype).sum(over) / valid.sum(over)
    weighted = (losses.to(dtype) * weights).sum(over) / weights.to(dtype).sum(over)
    heads: Sequence[int] = range(1, valid.shape[-1] + 1)
    return {f"loss/head_{k}": plain[k - 1] for k in heads} | {f"weighted_loss/head_{k}": weighted[k - 1] for k in heads}

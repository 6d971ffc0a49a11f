"""random-matched: random weights with the mean and the spread of another trainer's."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.loss.weights import statistics_dtype
from wmtp_algos.control import ControlTrainer

__all__ = ["RandomMatchedTrainer"]

_HALVINGS = 60


class RandomMatchedTrainer(ControlTrainer):
    """Trainer with log-normal random weights of another's mean and spread.

    w' = m · exp(σ z) / mean(exp(σ z)), z a standard normal number for each valid prediction of a head.

    m is the mean of the treatment's weights at that head, and σ is such that the *drawn* weights have their standard deviation
    too: both are equal in every step, not only on average. σ is found by halving an interval, which works because the
    coefficient of variation of exp(σ z) grows with σ; from 0 to √(n−1), the largest that n weights ≥ 0 can have.
    """

    def replace(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """See `ControlTrainer.replace`."""
        if len(weights) < 2:
            return weights
        exact = weights.to(statistics_dtype(weights.device))
        normal = torch.randn(len(weights), generator=generator, dtype=torch.float64).to(exact)
        normal = normal - normal.max()  # the largest exponential is 1, however large σ is
        mean = exact.mean()
        spread = torch.where(mean > 0, exact.std(correction=0) / mean, 0.0)
        low, high = torch.zeros_like(mean), torch.full_like(mean, 1e6)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            drawn = (middle * normal).exp()
            too_narrow = drawn.std(correction=0) / drawn.mean() < spread
            low, high = torch.where(too_narrow, middle, low), torch.where(too_narrow, high, middle)
        drawn = (low * normal).exp()
        return (drawn * (mean / drawn.mean())).to(weights.dtype)

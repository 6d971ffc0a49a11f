"""rare-token: an algorithm of a few lines."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.training import StepView, Trainer

__all__ = ["RareTokenTrainer"]


class RareTokenTrainer(Trainer):
    """Weighs a token by how rare it is among the n learned tokens of the step.

    w[b, j] = min((n / count(x[b, j]))^p / mean, max_weight), where the mean is over the learned tokens.

    Args:
        power: p.
        max_weight: the largest weight.
    """

    def __init__(self, power: float, max_weight: float) -> None:
        self.power = power
        self.max_weight = max_weight

    def token_weights(self, view: StepView) -> Tensor | None:
        """One weight a token, ``[B, S]``. The view holds the whole step, whatever the micro-batches are."""
        learn = view.batch.learn
        tokens = view.batch.input_ids[learn]
        weights = torch.zeros(learn.shape, device=tokens.device)
        if len(tokens) == 0:
            return weights
        _, number, count = torch.unique(tokens, return_inverse=True, return_counts=True)
        rarity = (len(tokens) / count[number]) ** self.power
        weights[learn] = (rarity / rarity.mean()).clamp(max=self.max_weight)
        return weights

"""shuffled: another trainer's weights in a random order."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp_algos.control import ControlTrainer

__all__ = ["ShuffledTrainer"]


class ShuffledTrainer(ControlTrainer):
    """Trainer that permutes another's weights within each head, anew in every step.

    w'[t, k] = w[π_k(t, k)], π_k a random permutation of the valid predictions of head k.

    Predictions are permuted, not tokens: a token at the start of a document is predicted by fewer heads than others, so
    tokens that change places would change the mean weight of a head.
    """

    def replace(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """See `ControlTrainer.replace`."""
        return weights[torch.randperm(len(weights), generator=generator).to(weights.device)]

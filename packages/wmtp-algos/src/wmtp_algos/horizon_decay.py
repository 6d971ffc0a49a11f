"""horizon-decay: far heads count less."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.trainers import StepView, Trainer

__all__ = ["HorizonDecayTrainer"]


class HorizonDecayTrainer(Trainer):
    """w[t, k] = decay^(k−1) (the weights of FastMTP's depths, arXiv 2509.18362).

    Args:
        decay: 0 < decay ≤ 1.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        shape = view.targets.ids.shape
        by_head = self._decay ** torch.arange(shape[-1], device=view.targets.ids.device, dtype=torch.float32)
        return by_head.expand(shape)

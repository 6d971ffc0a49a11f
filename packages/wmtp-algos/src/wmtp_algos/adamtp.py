"""adamtp: how far ahead is learned depends on how predictable the text is."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.training import StepView, Trainer

__all__ = ["AdaMTPTrainer"]


class AdaMTPTrainer(Trainer):
    """w[t, k] = 1 where k ≤ d[t], else 0 (the mask of AdaMTP, arXiv 2608.00434, with WMTP's own depth d).

        d[t] = 1 + the largest n ≤ H − 1 for which heads 1..n all give their targets at least the probability p

    So the first head that is not sure yet is the last that learns there. Predictions that do not count (targets in a prompt)
    are as if sure.

    Args:
        confidence: p.
        min_depth: d is never less.
    """

    needs_token_loss = True

    def __init__(self, confidence: float, min_depth: int) -> None:
        self._confidence = confidence
        self._min_depth = min_depth

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        assert view.token_loss is not None, "needs_token_loss asks for it"
        sure = ((-view.token_loss).exp() >= self._confidence) | ~view.targets.valid
        before = torch.ones_like(view.token_loss)  # whether all heads before this one are sure
        before[..., 1:] = sure[..., :-1].float().cumprod(dim=-1)
        before[..., : self._min_depth] = 1.0
        return before

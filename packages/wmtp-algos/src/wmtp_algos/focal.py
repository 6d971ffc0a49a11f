"""focal: what the model predicts well already counts less."""

from __future__ import annotations

from torch import Tensor

from wmtp.training import StepView, Trainer

__all__ = ["FocalTrainer"]


class FocalTrainer(Trainer):
    """The weight of the focal loss (Lin et al., arXiv 1708.02002, eq. 4): w[t, k] = (1 − p)^γ with p = exp(−CE[t, k]).

    The weight carries no gradient, unlike in the paper.

    Args:
        gamma: γ ≥ 0.
    """

    needs_token_loss = True

    def __init__(self, gamma: float) -> None:
        self._gamma = gamma

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        assert view.token_loss is not None, "needs_token_loss asks for it"
        return (-(-view.token_loss).expm1()) ** self._gamma

"""dft: the weight of a token is the probability that the model gives to it."""

from __future__ import annotations

from torch import Tensor

from wmtp.training import StepView, Trainer

__all__ = ["DFTTrainer"]


class DFTTrainer(Trainer):
    """Dynamic fine-tuning (Wu et al., arXiv 2508.05629): w[t, k] = P_k(x[t+k] | x_≤t) = exp(−CE[t, k])."""

    needs_token_loss = True

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        assert view.token_loss is not None, "needs_token_loss asks for it"
        return (-view.token_loss).exp()

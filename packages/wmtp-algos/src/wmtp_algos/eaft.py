"""eaft: what the model is sure of counts less."""

from __future__ import annotations

import math

from torch import Tensor

from wmtp.training import StepView, Trainer, TrainerSetup

__all__ = ["EAFTTrainer"]


class EAFTTrainer(Trainer):
    """Entropy-adaptive fine-tuning (Diao et al., arXiv 2601.02151): w[t, k] = H_K[t, k] / log K, between 0 and 1.

    H_K is the entropy of the K most probable tokens of head k at t, whose probabilities are made to add up to 1.

    Args:
        top_k: K ≥ 2; of a smaller vocabulary, all.
    """

    needs_entropy = True

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k

    def setup(self, setup: TrainerSetup) -> None:
        """See `Trainer.setup`."""
        self.entropy_top_k = self._top_k = min(self._top_k, setup.vocab_size)

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        assert view.entropy is not None, "needs_entropy asks for it"
        return view.entropy / math.log(self._top_k)

"""entropy-top: only what the model is unsure of is learned."""

from __future__ import annotations

from torch import Tensor

from wmtp.training import StepView, Trainer
from wmtp_algos.selection import Groups, Scope

__all__ = ["EntropyTopTrainer"]


class EntropyTopTrainer(Trainer):
    """w[t, k] = 1 for the share ρ of predictions with the highest entropy, else 0 (Wang et al., arXiv 2506.01939).

    Args:
        keep: ρ.
        scope: what predictions compete within.
    """

    needs_entropy = True

    def __init__(self, keep: float, scope: Scope) -> None:
        self._keep = keep
        self._scope: Scope = scope

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        assert view.entropy is not None, "needs_entropy asks for it"
        return Groups.of(self._scope, view).top(view.entropy, self._keep).float()

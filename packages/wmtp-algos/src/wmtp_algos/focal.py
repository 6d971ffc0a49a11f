"""focal: what the model predicts well already counts less."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge, lt

from wmtp import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import StepView

__all__ = ["Focal"]


@frozen(kw_only=True)
class Focal(Trainer):
    """Focal loss, w = (1 − p)^γ (Lin et al., arXiv 1708.02002).

    p = exp(−CE[t, k]) (eq. 4): the weight is lower where the model is already right. It carries no gradient, unlike in the
    paper.

    Args:
        gamma: γ; 0 gives the baseline.
    """

    type = "focal"
    needs_token_loss = True
    gamma: float = field(default=2.0, validator=[ge(0.0), lt(math.inf)])

    def token_weights(self, view: StepView) -> Tensor:
        """Return a weight for each prediction, ``[B, S, H]``."""
        return (-(-view.token_loss).expm1()) ** self.gamma

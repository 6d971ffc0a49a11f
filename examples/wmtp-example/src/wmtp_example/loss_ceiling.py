"""loss-ceiling: a token that the model finds very unlikely counts less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from attrs.validators import gt

from wmtp import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import StepView

__all__ = ["LossCeiling"]


@attrs.frozen(kw_only=True)
class LossCeiling(Trainer):
    """Limits what a single prediction adds to the loss.

    w[t, k] = min(1, ceiling / CE[t, k]), so that w · CE ≤ ceiling.

    A typo or a garbled number then teaches no more than a token that is merely hard. The weight carries no gradient.

    Args:
        ceiling: in nats.
    """

    type = "loss-ceiling"
    needs_token_loss = True
    ceiling: float = attrs.field(default=5.0, validator=gt(0.0))

    def token_weights(self, view: StepView) -> Tensor:
        """Return a weight for each prediction, ``[B, S, H]``."""
        return (self.ceiling / view.token_loss).clamp(max=1.0)

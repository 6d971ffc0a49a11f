"""horizon-decay: far heads count less."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import gt, le

from wmtp import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import StepView

__all__ = ["HorizonDecay"]


@frozen(kw_only=True)
class HorizonDecay(Trainer):
    """Decay over the heads: w = decay^(k−1) for head k.

    FastMTP (arXiv 2509.18362) weighs its depths so. The same as ``decay`` in ``[models.base.heads]``, as a trainer: to compare
    with, and to wrap in controls.

    Args:
        decay: the factor from one head to the next; 1 gives the baseline.
    """

    type = "horizon-decay"
    decay: float = field(default=0.6, validator=[gt(0.0), le(1.0)])

    def token_weights(self, view: StepView) -> Tensor:
        """Return a weight for each prediction, ``[B, S, H]``."""
        import torch

        shape = view.targets.ids.shape
        by_head = self.decay ** torch.arange(shape[-1], device=view.targets.ids.device, dtype=torch.float32)
        return by_head.expand(shape)

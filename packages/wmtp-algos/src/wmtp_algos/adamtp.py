"""adamtp: learn as far ahead as the text is predictable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge, le

from wmtp import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import StepView

__all__ = ["AdaMTP"]


@frozen(kw_only=True)
class AdaMTP(Trainer):
    """Multi-token prediction as far ahead as the text is predictable (arXiv 2608.00434).

    w = 1 where k ≤ d_t, else 0, as AdaMTP masks heads. How the paper finds d_t was not available to us. This is WMTP's own
    reading: d_t = 1 + the number of heads, from the first on, that all give their targets at least the probability
    ``confidence``. The first head that is not sure is the last that learns there. A target that is not learned (of a prompt)
    counts as not sure, so heads 2..H learn nothing at positions before the last of a prompt. With new heads, warm them up first
    (``warmup_steps`` in ``[models.base.heads]``), as the paper does.

    Args:
        confidence: probability from which a head counts as sure; with 0, and without prompts, it is the baseline.
        min_depth: number of heads that learn everywhere.
    """

    type = "adamtp"
    needs_token_loss = True
    confidence: float = field(default=0.5, validator=[ge(0.0), le(1.0)])
    min_depth: int = field(default=1, validator=ge(1))

    def token_weights(self, view: StepView) -> Tensor:
        """Return a weight for each prediction, ``[B, S, H]``."""
        sure = ((-view.token_loss).exp() >= self.confidence) & view.targets.valid
        before = view.uniform()  # 1 where all heads before this one are sure
        before[..., 1:] = sure[..., :-1].float().cumprod(dim=-1)
        before[..., : self.min_depth] = 1.0
        return before

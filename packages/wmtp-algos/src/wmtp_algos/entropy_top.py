"""entropy-top: only what the model is unsure of is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attrs import field, frozen
from attrs.validators import gt, le

from wmtp import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import StepView

__all__ = ["EntropyTop"]


@frozen(kw_only=True)
class EntropyTop(Trainer):
    """Selection of the share of predictions with the highest entropy.

    Learns where the model is unsure: w = 1 for that share, else 0. Wang et al. (arXiv 2506.01939) do so in reinforcement
    learning, with ρ = 0.2.

    Args:
        keep: ρ, the share that is learned.
        scope: what predictions compete within: the whole ``batch`` of an optimizer step, each ``sequence`` (a document), or
            each ``head``. Far heads are less sure than head 1, and so win in a batch.
    """

    type = "entropy-top"
    needs_entropy = True
    keep: float = field(default=0.2, validator=[gt(0.0), le(1.0)])
    scope: Literal["batch", "sequence", "head"] = "batch"

    def token_weights(self, view: StepView) -> Tensor:
        """Return a weight for each prediction, ``[B, S, H]``."""
        from wmtp_algos.selection import Groups

        return Groups.of(self.scope, view).top(view.entropy, self.keep).float()

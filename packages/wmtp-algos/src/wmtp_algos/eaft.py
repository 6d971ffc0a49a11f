"""eaft: what the model is sure of counts less."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge

from wmtp import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import StepView

__all__ = ["EAFT"]


@frozen(kw_only=True)
class EAFT(Trainer):
    """Entropy-adaptive fine-tuning (Diao et al., arXiv 2601.02151).

    w = H / log K. H is the entropy of the model's K most probable tokens, made to add up to 1. Where the model is sure, and the
    data says something else, little is learned; so less is forgotten. Published with the mean over tokens: set
    ``train.normalizer = "valid"``.

    Args:
        top_k: K.
    """

    type = "eaft"
    published_normalizer = "valid"
    needs_entropy = True
    top_k: int = field(default=20, validator=ge(2))

    @property
    def entropy_top_k(self) -> int:  # type: ignore[override]
        """K."""
        return self.top_k

    def token_weights(self, view: StepView) -> Tensor:
        """Return a weight for each prediction, ``[B, S, H]``."""
        return view.entropy / math.log(min(self.top_k, view.vocab_size))

"""loss-truncation: documents above a running quantile of loss are not learned.

The config class; it imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from attrs.validators import ge, gt, lt

from wmtp import TrainerConfig

if TYPE_CHECKING:
    from wmtp import Trainer

__all__ = ["LossTruncation"]


@attrs.frozen(kw_only=True)
class LossTruncation(TrainerConfig):
    """Leaves out the documents with the highest loss.

    Source: Kang and Hashimoto, ACL 2020, arXiv 2004.14589.

    The log loss asks a model to explain every document, wrong and garbled ones too. Here a document whose loss is above the
    (1 − drop) quantile of the last documents is not learned: w = 0, else 1.

    Args:
        drop: c, about this share of documents is left out.
        window: number of last documents over which the quantile is taken.
        warmup_steps: optimizer steps at the start in which all is learned. What a model without training finds hard says
            nothing yet (the paper's "hotstart").
    """

    type = "loss-truncation"
    drop: float = attrs.field(default=0.1, validator=[ge(0.0), lt(1.0)])
    window: int = attrs.field(default=1000, validator=gt(0))
    warmup_steps: int = attrs.field(default=100, validator=ge(0))

    def build(self) -> Trainer:
        """Make the trainer; only this imports torch."""
        from wmtp_example.trainer import LossTruncationTrainer

        return LossTruncationTrainer(self)

"""Weighted multi-token loss without full logits; usable by itself: docs/loss.md.

`mtp_loss` does everything. The others are its parts, for a caller that makes the coefficients itself.
"""

import wmtp.loss.operator  # noqa: F401  registered before torch.compile traces anything
from wmtp.loss.cross_entropy import TokenPass, token_losses, token_pass, weighted_cross_entropy
from wmtp.loss.mtp import IGNORED, MTPLoss, mtp_loss
from wmtp.loss.objective import HeadAgreement, HeadLoss, HeadObjective, head_agreement, weighted_head_loss
from wmtp.loss.unembedding import Unembedding

__all__ = [
    "IGNORED",
    "HeadAgreement",
    "HeadLoss",
    "HeadObjective",
    "MTPLoss",
    "TokenPass",
    "Unembedding",
    "head_agreement",
    "mtp_loss",
    "token_losses",
    "token_pass",
    "weighted_cross_entropy",
    "weighted_head_loss",
]

"""baseline-mtp: every prediction counts the same."""

from __future__ import annotations

from wmtp.trainers import Trainer

__all__ = ["BaselineMTPTrainer"]


class BaselineMTPTrainer(Trainer):
    """Plain multi-token prediction (Gloeckle et al., arXiv 2404.19737, eq. 2): w[t, k] = 1.

    The loss is the mean cross entropy of all H heads, by the head weights α_k. It is what every other algorithm is compared
    with: constant weights give the same loss and the same gradients.
    """

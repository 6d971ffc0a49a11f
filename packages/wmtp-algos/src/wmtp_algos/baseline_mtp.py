"""baseline-mtp: every prediction counts the same."""

from __future__ import annotations

from attrs import frozen

from wmtp import Trainer

__all__ = ["BaselineMTP"]


@frozen(kw_only=True)
class BaselineMTP(Trainer):
    """Plain multi-token prediction, w = 1 everywhere (Gloeckle et al., arXiv 2404.19737).

    The loss is the mean cross entropy of all H heads, by the head weights α_k. It is what every other algorithm is compared
    with: constant weights give the same loss and the same gradients.
    """

    type = "baseline-mtp"

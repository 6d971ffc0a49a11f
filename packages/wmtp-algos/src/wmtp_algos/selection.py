"""Scores of predictions that compete: a softmax over them, or the best of them."""

from __future__ import annotations

from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from wmtp.loss.weights import statistics_dtype
from wmtp.trainers import StepView

__all__ = ["Groups", "Scope"]

Scope = Literal["batch", "sequence", "head"]


@frozen(kw_only=True, eq=False)
class Groups:
    """Groups of predictions that compete with each other.

    Args:
        number: ``[B, S, H]`` int64, the group of each prediction; ``count`` where it is not valid.
        count: how many groups there are; some may be empty.
    """

    number: Tensor
    count: int

    @classmethod
    def of(cls, scope: Scope, view: StepView) -> Groups:
        """Make the groups of a step.

        Args:
            scope: ``batch``: all valid predictions are one group; ``sequence``: those of a document are; ``head``: those of a
                head are.
            view: the step.
        """
        valid = view.targets.valid
        horizon = valid.shape[-1]
        if scope == "batch":
            number, count = torch.zeros_like(view.targets.ids), 1
        elif scope == "sequence":
            number, count = view.batch.document.unsqueeze(-1).expand(valid.shape), len(view.batch.documents)
        else:
            number, count = torch.arange(horizon, device=valid.device).expand(valid.shape), horizon
        return cls(number=torch.where(valid, number, count), count=count)

    def top(self, scores: Tensor, keep: float) -> Tensor:
        """Mark the best share of each group.

        Args:
            scores: ``[B, S, H]``; only valid places count.
            keep: the share, 0 < keep ≤ 1.

        Returns:
            ``[B, S, H]`` bool: of n valid predictions in a group those with the ``keep · n`` highest scores, rounded to a whole
            number, at least 1. Of equal scores the first in the order of the data win.
        """
        group = self.number.flatten()
        best_first = scores.flatten().argsort(descending=True, stable=True)
        order = best_first[group[best_first].argsort(stable=True)]
        sizes = self._sizes(group)
        wanted = (sizes * keep).round().clamp(min=1).to(torch.int64)
        wanted[self.count] = 0  # what is not valid
        starts = (sizes.cumsum(0) - sizes).to(torch.int64)
        place = torch.arange(len(order), device=order.device) - starts[group[order]]
        kept = torch.zeros_like(group, dtype=torch.bool)
        kept[order] = place < wanted[group[order]]
        return kept.view(scores.shape)

    def softmax(self, scores: Tensor) -> Tensor:
        """Compute the softmax over each group, scaled to a mean of 1.

        The scale is the number of valid predictions in the group.

        Args:
            scores: ``[B, S, H]``; only valid places count.

        Returns:
            ``[B, S, H]`` fp32.
        """
        group = self.number.flatten()
        exact = scores.flatten().to(statistics_dtype(scores.device))
        highest = exact.new_full((self.count + 1,), -torch.inf).scatter_reduce(0, group, exact, "amax")
        exponentials = (exact - highest[group]).exp()
        sums = torch.zeros_like(highest).index_add(0, group, exponentials)
        return (exponentials * (self._sizes(group) / sums)[group]).view(scores.shape).float()

    def mean_one(self, weights: Tensor) -> Tensor:
        """Divide weights ``[B, S, H]`` ≥ 0 by the mean of their group."""
        group = self.number.flatten()
        exact = weights.flatten().to(statistics_dtype(weights.device))
        sums = exact.new_zeros(self.count + 1).index_add(0, group, exact)
        return (exact * (self._sizes(group) / sums)[group]).view(weights.shape).float()

    def _sizes(self, group: Tensor) -> Tensor:
        """Predictions in each group, and as the last number those that are not valid."""
        ones = torch.ones(group.shape, dtype=statistics_dtype(group.device), device=group.device)
        return ones.new_zeros(self.count + 1).index_add(0, group, ones)

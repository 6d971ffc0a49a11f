"""Softmax over scores that compete, or selection of the best."""

from __future__ import annotations

from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from wmtp.loss.weights import statistics_dtype
from wmtp.trainers import StepView

__all__ = ["Groups", "Scope"]

#: T is raised to 2^20 times itself at most, and found to 1 in 10⁵
_DOUBLINGS, _HALVINGS = 20.0, 21

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

    def scaled(self, scores: Tensor) -> Tensor:
        """Scale each group's scores ``[B, S, H]`` to 0 … 1.

        0 where all are equal, and where not valid.
        """
        group, values = self.number.flatten(), scores.flatten()
        ends = [
            values.new_zeros(self.count + 1).scatter_reduce(0, group, values, by, include_self=False) for by in ("amin", "amax")
        ]
        low, high = (end[group] for end in ends)
        return torch.where(group < self.count, (values - low) / (high - low + 1e-8), 0.0).view(scores.shape)

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

    def tempered(self, scores: Tensor, temperature: float, *, max_weight: float, min_share: float) -> tuple[Tensor, Tensor]:
        """Compute clipped softmax(scores / T), with T raised where few predictions count.

        A softmax of scores that are many times T apart gives all weight to a few. T is then the lowest at which the effective
        sample of the group, (Σw)² / Σw², is ``min_share`` of its predictions: the adaptive tempering of sequential Monte Carlo
        (Jasra et al., 2011, *Inference for Lévy-driven stochastic volatility models via adaptive SMC*). In all other groups T
        is ``temperature``, and nothing changes.

        Args:
            scores: ``[B, S, H]``; only valid places count.
            temperature: T > 0.
            max_weight: weights are clipped to this.
            min_share: of the group, 0 ≤ min_share < 1; 0 leaves T as it is.

        Returns:
            Weights ``[B, S, H]`` fp32, of mean 1 before the clip, and T of each group ``[count]``.
        """
        factor = self._factors(scores / temperature, max_weight, min_share)
        of_group = torch.cat([factor, factor.new_ones(1)])
        weights = self.softmax(scores / (temperature * of_group[self.number])).clamp(max=max_weight)
        return weights, temperature * factor

    def _factors(self, scores: Tensor, max_weight: float, min_share: float) -> Tensor:
        """Find each group's factor of T by bisection, ``[count]`` ≥ 1."""
        group, order = self.number.flatten().sort(stable=True)
        sizes = self._sizes(group)[: self.count]
        scores = scores.flatten()[order].to(sizes.dtype)
        highest = scores.new_full((self.count + 1,), -torch.inf).scatter_reduce(0, group, scores, "amax")
        below = scores - highest[group]
        ends = sizes.cumsum(0).to(torch.int64)

        def sums(values: Tensor) -> Tensor:
            running = torch.cat([values.new_zeros(1), values.cumsum(0)])
            return running[ends] - running[ends - sizes.to(torch.int64)]

        def enough(logarithm: Tensor) -> Tensor:
            """Tell which groups' effective sample suffices at T · 2^logarithm."""
            padded = torch.cat([logarithm, logarithm.new_zeros(1)])
            exponentials = (below / padded[group].exp2()).exp()
            limits = torch.cat([max_weight * sums(exponentials) / sizes, sizes.new_ones(1)])
            clipped = exponentials.minimum(limits[group])
            return sums(clipped).square() >= min_share * sizes * sums(clipped.square())

        low, high = torch.zeros_like(sizes), torch.full_like(sizes, _DOUBLINGS)
        fits = enough(low) | (sizes == 0)
        for _ in range(_HALVINGS):  # a fixed number: whether one is needed is not asked of a GPU
            middle = (low + high) / 2
            found = enough(middle)
            low, high = torch.where(found, low, middle), torch.where(found, middle, high)
        return torch.where(fits, 1.0, high.exp2())

    def mean_one(self, weights: Tensor) -> Tensor:
        """Divide weights ``[B, S, H]`` ≥ 0 by their group's mean."""
        group = self.number.flatten()
        exact = weights.flatten().to(statistics_dtype(weights.device))
        sums = exact.new_zeros(self.count + 1).index_add(0, group, exact)
        return (exact * (self._sizes(group) / sums)[group]).view(weights.shape).float()

    def _sizes(self, group: Tensor) -> Tensor:
        """Count each group's predictions; the last number counts those not valid."""
        ones = torch.ones(group.shape, dtype=statistics_dtype(group.device), device=group.device)
        return ones.new_zeros(self.count + 1).index_add(0, group, ones)

"""Confidence intervals by the bootstrap, from a thousand resamples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wmtp.evaluation.base import Estimate

__all__ = ["Bootstrap"]

_DRAWS = 1000
_AT_ONCE = 2**24  # numbers of one block of drawn counts


class Bootstrap:
    """Draws units again.

    Args:
        units: how many there are.
        unit: what they are.
        seed: of the draws.
    """

    def __init__(self, units: int, unit: str, seed: int) -> None:
        self._units, self._unit, self._seed = units, unit, seed

    def ratio(
        self, above: ArrayLike, below: ArrayLike | None = None, *, transform: Callable[[NDArray], NDArray] | None = None
    ) -> Estimate:
        """Estimate Σ above / Σ below over the units, with its interval.

        Args:
            above: ``[units]``.
            below: ``[units]``; None: 1 each, for a mean.
            transform: applied to the ratio, for instance ``exp``.
        """
        sums = np.stack([np.asarray(above, float), np.ones(self._units) if below is None else np.asarray(below, float)], axis=1)
        generator = np.random.default_rng(self._seed)
        drawn = []
        block = max(1, _AT_ONCE // max(1, self._units))
        for start in range(0, _DRAWS, block):
            count = min(block, _DRAWS - start)
            # how often each unit is drawn
            weights = generator.multinomial(self._units, np.full(self._units, 1 / self._units), size=count)
            drawn.append(weights @ sums)
        apply = transform or (lambda value: value)
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = sums.sum(0)
            value = apply(whole[:1] / whole[1:])[0]
            resampled = np.concatenate(drawn)
            values = apply(resampled[:, 0] / resampled[:, 1])
        values = values[~np.isnan(values)]
        low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (np.nan, np.nan)
        return Estimate(value=float(value), low=float(low), high=float(high), n=self._units, unit=self._unit)

"""Student's t, paired differences and Holm's correction. Needs neither numpy nor scipy."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean, quantiles, stdev
from typing import Final

from attrs import frozen

__all__ = ["Difference", "bootstrap_ratio", "holm", "paired_difference", "t_cdf", "t_quantile"]

_CONFIDENCE: Final = 0.95
_DRAWS: Final = 1000


def t_cdf(t: float, freedom: int) -> float:
    """Compute P(T ≤ t) of Student's distribution.

    Abramowitz & Stegun 26.7.3 and 26.7.4.

    Args:
        t: any number.
        freedom: degrees of freedom, a whole number of at least 1.
    """
    if freedom < 1:
        raise ValueError(f"freedom: {freedom} is not at least 1")
    if math.isinf(t):
        return 0.0 if t < 0 else 1.0
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(freedom // 2):
        total += term
        term *= square * ((2 * i + 2) / (2 * i + 3) if odd else (2 * i + 1) / (2 * i + 2))
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2


def t_quantile(probability: float, freedom: int) -> float:
    """Invert `t_cdf` by bisection.

    Args:
        probability: above 0 and below 1.
        freedom: see `t_cdf`.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability: {probability} is not between 0 and 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return high


@frozen(kw_only=True)
class Difference:
    """Mean of paired differences.

    Args:
        mean: of the differences.
        low: lower end of the 95 % interval; None for one pair, of which no spread is known.
        high: its upper end.
        p: two-sided, of a mean of 0; None for one pair.
        n: pairs.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Estimate the mean of ``first − second``, with a 95 % interval.

    Over pairs, by Student's t.

    Args:
        first: one number a pair.
        second: as many.

    Raises:
        ValueError: there is no pair, or they do not match.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("no pair to compare")
    n, mean = len(differences), fmean(differences)
    if n == 1:
        return Difference(mean=mean, low=None, high=None, p=None, n=1)
    error = stdev(differences) / math.sqrt(n)
    half = t_quantile((1 + _CONFIDENCE) / 2, n - 1) * error
    p = 2 * t_cdf(-abs(mean) / error, n - 1) if error else float(mean == 0)
    return Difference(mean=mean, low=mean - half, high=mean + half, p=p, n=n)


def bootstrap_ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Estimate Σ above / Σ below by a bootstrap over units.

    Units are drawn with replacement, a thousand times. The draws are the same in every call with as many units.

    Args:
        above: one number a unit.
        below: as many, none of them negative.

    Returns:
        the ratio, and the ends of its 95 % interval.
    """
    draw, units, found = random.Random(0), range(len(above)), []
    for _ in range(_DRAWS):
        drawn = draw.choices(units, k=len(above))
        if total := sum(below[i] for i in drawn):
            found.append(sum(above[i] for i in drawn) / total)
    cuts = quantiles(found, n=40)
    return sum(above) / sum(below), cuts[0], cuts[-1]


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p values of a family of comparisons (Holm 1979).

    In the order in which they are given.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted

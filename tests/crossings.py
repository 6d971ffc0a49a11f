"""Choose what the default suite takes of many cases; ``just slow`` takes the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["sampled"]


def sampled(cases: Iterable[Any], every: int) -> list[Any]:
    """Mark all cases but each ``every``-th as slow.

    Of a crossing, ``every`` should share no factor with the number of values of a parameter: the sample has each value then.

    Args:
        cases: as `pytest.mark.parametrize` takes them; those of several parameters are tuples.
        every: the distance between two cases of the sample, which begins with the first.
    """
    found = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[pytest.mark.slow] if number % every else []))
    return found

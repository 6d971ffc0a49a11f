"""Suggest the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest"]


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Find the known name that is most like ``name``; None where none is.

    Args:
        name: as it was written.
        known: what it can be.
        cutoff: the least similarity, as `difflib.SequenceMatcher.ratio` measures it.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Write the question ``did you mean 'NAME'?``; None where no known name is like it."""
    close = nearest(name, known)
    return None if close is None else f"did you mean '{close}'?"

"""Tokens that heads 2..H draft from, chosen by how often they occur."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from wmtp.data.dataset import TokenDataset

__all__ = ["frequent_tokens"]


def frequent_tokens(data: TokenDataset, size: int, vocab_size: int, ends: Collection[int]) -> tuple[int, ...]:
    """Choose the most frequent tokens of some data.

    FastMTP chooses so for a language (arXiv 2509.18362).

    Args:
        data: whose tokens are counted.
        size: how many are chosen.
        vocab_size: V.
        ends: tokens that end a text, which are always among them.

    Returns:
        their ids, ascending; of equally frequent ones the lowest.
    """
    counts = data.token_counts(vocab_size)
    counts[list(ends)] = counts.max(initial=0) + 1
    return tuple(sorted(np.argsort(-counts, kind="stable")[: max(size, len(set(ends)))].tolist()))

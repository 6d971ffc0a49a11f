"""Differences between two arms over the documents of the evaluation data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from wmtp.studies.record import RunRecord
from wmtp.studies.statistics import bootstrap_ratio

__all__ = ["paired_over_documents"]


def paired_over_documents(
    metric: str, first: Mapping[int, RunRecord], second: Mapping[int, RunRecord], seeds: Sequence[int]
) -> tuple[float, float, float, int] | None:
    """Estimate two arms' difference in a head's loss, over documents.

    With a 95 % interval by a bootstrap over documents. Each document's losses are averaged over the seeds and subtracted before
    it is drawn, so what makes a document hard for both arms is no spread. The interval says how far other texts would move the
    difference, with these runs as they are.

    Args:
        metric: ``eval/loss/head_k``.
        first: runs of an arm, by seed.
        second: runs of the arm that is subtracted.
        seeds: that both have.

    Returns:
        the difference, the ends of its interval, and how many documents; None where the metric is another, or runs have no
        losses by document, or other documents.
    """
    if (head := re.fullmatch(r"eval/loss/(head_\d+)", metric)) is None or not seeds:
        return None
    found = [[arm[seed].page.get("documents", {}).get(head[1]) for seed in seeds] for arm in (first, second)]
    known = [one for arm in found for one in arm if one is not None]
    if len(known) < 2 * len(seeds) or any(one[1] != known[0][1] for one in known) or len(known[0][1]) < 2:
        return None
    counts = known[0][1]
    differences = [
        sum(own[0][i] - other[0][i] for own, other in zip(*found, strict=True)) / len(seeds) for i in range(len(counts))
    ]
    return *bootstrap_ratio(differences, counts), len(counts)

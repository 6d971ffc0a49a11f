"""Lists of predictions for `wmtp.loss.triton.fused`, sorted on the device by kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

import torch
from attrs import frozen
from torch import Tensor

from wmtp.loss.cross_entropy import HeadLayout, Problem

__all__ = ["Lengths", "PredictionList", "prediction_lists"]

# chunks that are started before the host looks at counts that it was not told
_AHEAD = 2


@frozen(kw_only=True, eq=False)
class PredictionList:
    """Predictions of all heads sharing an unembedding, in order of computation.

    Args:
        places: the heads, from 0.
        layout: their common layout.
        order: ``[M]``; see `wmtp.loss.triton.kernels`.
        kind: ``[M]``.
        targets: ``[M]``.
        coefficients: ``[M]`` fp32.
        counts: ``[2]``: predictions with a coefficient; predictions that have one or are measured.
        at_most: upper bounds of both, given by the caller; or None.
        learns: False if there are no coefficients at all.
    """

    places: range
    layout: HeadLayout
    order: Tensor
    kind: Tensor
    targets: Tensor
    coefficients: Tensor
    counts: Tensor
    at_most: tuple[int, int] | None
    learns: bool


def prediction_lists(problem: Problem) -> list[PredictionList]:
    """A list for each run of neighbouring heads that share everything."""
    return [_sort(problem, layout, places) for layout, places in _runs(problem.heads)]


def _runs(heads: Sequence[HeadLayout]) -> list[tuple[HeadLayout, range]]:
    """Neighbouring heads that share everything, and which they are."""
    runs: list[tuple[HeadLayout, range]] = []
    for place, layout in enumerate(heads):
        if runs and runs[-1][0] == layout:
            runs[-1] = layout, range(runs[-1][1].start, place + 1)
        else:
            runs.append((layout, range(place, place + 1)))
    return runs


def _sort(problem: Problem, layout: HeadLayout, places: range) -> PredictionList:
    """Order the predictions of some heads by kind.

    The host reads nothing here.
    """
    heads = slice(places.start, places.stop)
    valid = problem.valid[:, heads].T.reshape(-1)
    if problem.coefficients is None:
        coefficients = torch.zeros(valid.shape, dtype=torch.float32, device=valid.device)
    else:
        coefficients = problem.coefficients[:, heads].T.reshape(-1).float()
    learned = coefficients != 0
    if problem.lse is not None:
        valid = learned
    kind = torch.where(learned, 0, torch.where(valid, 1, 2)).to(torch.uint8)
    bound = len(kind) if problem.valid_counts is None else min(sum(problem.valid_counts[k] for k in places), len(kind))
    most = 0 if problem.coefficients is None else problem.at_most
    at_most = None
    if most is not None and (problem.lse is not None or problem.valid_counts is not None):
        at_most = min(most, bound), min(most, bound) if problem.lse is not None else bound
        bound = at_most[1]
    kind, order = torch.sort(kind, stable=True)
    order, kind = order[:bound], kind[:bound]
    return PredictionList(
        places=places,
        layout=layout,
        order=order,
        kind=kind,
        targets=problem.ids[:, heads].T.reshape(-1)[order],
        coefficients=coefficients[order],
        counts=torch.stack([learned.sum(), (learned | valid).sum()]),
        at_most=at_most,
        learns=problem.coefficients is not None,
    )


class Lengths:
    """Lengths of the lists' parts, read late from the device."""

    def __init__(self, lists: Sequence[PredictionList]) -> None:
        self._lists = lists
        self._started = 0
        self._told = [predictions.at_most for predictions in lists]
        self._arrived: torch.cuda.Event | None = None
        self._host: Tensor | None = None
        if None in self._told:
            counts = torch.stack([predictions.counts for predictions in lists])
            if counts.is_cuda:
                self._host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
                self._host.copy_(counts, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record()
            else:
                self._host = counts

    def chunks(self, number: int, rows: int, ahead: int) -> Iterator[tuple[int, int, bool]]:
        """Yield each chunk's first and last row, and if it has coefficients.

        Args:
            number: which list.
            rows: of a chunk, at most.
            ahead: of a chunk that is started before it is known how many there are.
        """
        start = 0
        total = len(self._lists[number].order)
        while self._told[number] is None and self._started < _AHEAD and start < total:
            self._started += 1
            yield start, min(start + ahead, total), self._lists[number].learns
            start += ahead
        learned, measured = self._read(number)
        for first, last, has_coefficients in ((start, learned, True), (max(start, learned), measured, False)):
            if last <= first:
                continue
            # chunks of about equal size, in whole tiles: a small one is slow
            equal = ceil((last - first) / ceil((last - first) / rows))
            size = min(ceil(equal / 128) * 128, rows)
            for at in range(first, last, size):
                yield at, min(at + size, last), has_coefficients

    def _read(self, number: int) -> tuple[int, int]:
        told = self._told[number]
        if told is not None:
            return told
        assert self._host is not None, "lengths are asked for once they are sent"
        if self._arrived is not None:
            self._arrived.synchronize()
        learned, measured = self._host[number].tolist()
        return learned, measured

    def broken(self) -> Tensor | None:
        """Tell on the device whether a given count is too small."""
        wrong = [
            (predictions.counts[0] > predictions.at_most[0]) | (predictions.counts[1] > predictions.at_most[1])
            for predictions in self._lists
            if predictions.at_most is not None
        ]
        return torch.stack(wrong).any() if wrong else None

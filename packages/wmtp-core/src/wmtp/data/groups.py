"""Batches of documents that an algorithm wants to see together.

Pairs of answers to one problem, for instance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wmtp.data.packing import Numbers, Rows, best_fit, joined, one_each, sorted_in_windows
from wmtp.errors import ConfigError

__all__ = ["GroupBatches"]


class GroupBatches:
    """Batches of groups: documents that must share an optimizer step.

    Every epoch has the same number of batches. The documents of a group share a row where they fit into one (with ``packing``),
    else they get rows of their own in the same batch. In each epoch groups of equal size change places by chance.

    Args:
        lengths: tokens of each document.
        groups: for each document the number of its group.
        max_length: tokens in a row.
        batch_size: the most rows of a batch.
        packing: whether a row may hold several documents.

    Raises:
        ConfigError: a group needs more rows than a batch has.
    """

    def __init__(self, lengths: Numbers, groups: Numbers, *, max_length: int, batch_size: int, packing: bool) -> None:
        order = np.argsort(groups, kind="stable")
        begins = np.flatnonzero(np.diff(groups[order], prepend=np.iinfo(np.int64).min))
        self._groups = Rows(order, np.append(begins, len(order)))
        self._counts = np.diff(self._groups.starts)
        self._totals = self._groups.lengths(lengths)
        fits = self._totals <= max_length if packing else self._counts == 1
        # groups that have a row of their own or share one, and rows of the others
        self._small = np.flatnonzero(fits)
        self._packed = best_fit(self._totals[fits], max_length) if packing else one_each(np.arange(len(self._small)))
        self._large: list[Rows] = []
        for group in np.flatnonzero(~fits):
            documents = self._groups.row(int(group))
            rows = best_fit(lengths[documents], max_length) if packing else one_each(np.arange(len(documents)))
            self._large.append(Rows(documents[rows.members], rows.starts))
        # a bundle is what one batch must hold whole: a row of small groups, or all rows of a large one
        self._sizes = np.array([1] * len(self._packed) + [len(rows) for rows in self._large], np.int64)
        if int(self._sizes.max()) > batch_size:
            raise ConfigError(
                f"data.train.batch_size: {batch_size}, but the trainer wants documents in one step that need "
                f"{int(self._sizes.max())} rows; write at least that many"
            )
        self._pattern = best_fit(self._sizes, batch_size)
        self._batch_size = batch_size
        self._packing = packing

    def __len__(self) -> int:
        return len(self._pattern)

    def epoch(self, random: np.random.Generator | None) -> tuple[Rows, NDArray[np.int64]]:
        """Return the rows of one epoch, and the batch boundaries among them.

        Args:
            random: shuffles the order; None: ordered by document number.
        """
        packed = self._packed if random is None else self._packed.exchanged(self._totals[self._small], random)
        rows = joined([self._documents(packed), *self._large])
        first_rows = np.concatenate([[0], np.cumsum(self._sizes)])
        bundles = Rows(np.arange(len(rows)), first_rows)
        pattern = self._pattern
        if random is None:
            leaders = np.minimum.reduceat(rows.members, rows.starts[:-1])
            pattern = pattern.reordered(np.argsort(np.minimum.reduceat(leaders[first_rows[:-1]], pattern.starts[:-1])))
        else:
            pattern = self._dealt(self._order(random)).reordered(random.permutation(len(pattern)))
        taken = bundles.reordered(pattern.members)
        starts = np.concatenate([[0], np.cumsum(pattern.lengths(self._sizes))])
        return rows.reordered(taken.members), starts

    def _documents(self, packed: Rows) -> Rows:
        """Rows of small groups as rows of documents."""
        groups = self._small[packed.members]
        ends = np.concatenate([[0], np.cumsum(self._counts[groups])])
        return Rows(self._groups.reordered(groups).members, ends[packed.starts])

    def _order(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Shuffle all bundles.

        Where rows are padded, neighbours have rows of similar length.
        """
        order = random.permutation(len(self._sizes))
        if self._packing:
            return order
        lengths = np.concatenate([self._totals[self._small], np.delete(self._totals, self._small)])
        return sorted_in_windows(order, lengths, self._batch_size)

    def _dealt(self, order: NDArray[np.int64]) -> Rows:
        """Deal the bundles, in this order, to places of their size."""
        places = self._sizes[self._pattern.members]
        members = np.empty_like(order)
        members[np.argsort(places, kind="stable")] = order[np.argsort(self._sizes[order], kind="stable")]
        return Rows(members, self._pattern.starts)

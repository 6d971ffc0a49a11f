"""Puts documents into rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

__all__ = ["Rows", "best_fit", "in_order", "joined", "one_each", "sorted_in_windows"]

Numbers = NDArray[np.int64]

#: batches of padded rows that are sorted by length together
_WINDOW: Final = 64


@frozen(eq=False)
class Rows:
    """Rows of documents.

    Args:
        members: numbers of documents, row after row.
        starts: where each row starts in ``members``, and where the last ends: one more than there are rows.
    """

    members: Numbers
    starts: Numbers

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> Numbers:
        """Return the documents of one row."""
        return self.members[self.starts[number] : self.starts[number + 1]]

    def lengths(self, of_documents: Numbers) -> Numbers:
        """Sum the tokens in each row, from the tokens in each document."""
        return np.add.reduceat(of_documents[self.members], self.starts[:-1])

    def reordered(self, order: Numbers) -> Rows:
        """Permute the rows."""
        counts = np.diff(self.starts)[order]
        starts = np.concatenate([[0], np.cumsum(counts)])
        shift = np.repeat(self.starts[:-1][order] - starts[:-1], counts)
        return Rows(self.members[np.arange(starts[-1]) + shift], starts)

    def exchanged(self, lengths: Numbers, random: np.random.Generator) -> Rows:
        """Swap documents of equal length at random; rows keep their lengths."""
        shuffled = random.permutation(len(lengths))
        by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        replacement = np.empty_like(by_length)
        replacement[np.argsort(lengths, kind="stable")] = by_length
        return Rows(replacement[self.members], self.starts)


def one_each(order: Numbers) -> Rows:
    """A row for each document, in this order."""
    return Rows(order, np.arange(len(order) + 1))


def sorted_in_windows(order: Numbers, lengths: Numbers, batch_size: int) -> Numbers:
    """Sort ``order`` by length within each window of some batches."""
    order, window = order.copy(), batch_size * _WINDOW
    for start in range(0, len(order), window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
    return order


def in_order(lengths: Numbers, capacity: int) -> Rows:
    """Pack documents in order into rows of at most ``capacity`` tokens.

    A row ends where the next document has no room.
    """
    ends = np.cumsum(lengths)
    starts = [0]
    while starts[-1] < len(lengths):
        begun = ends[starts[-1] - 1] if starts[-1] else 0
        starts.append(int(np.searchsorted(ends, begun + capacity, side="right")))
    return Rows(np.arange(len(lengths)), np.array(starts))


def best_fit(lengths: Numbers, capacity: int) -> Rows:
    """Pack documents into rows of ``capacity`` tokens, best fit decreasing.

    They go by falling length, each into the row with the least room that is enough. The room left is a whole number up to
    ``capacity``, so the rows are kept by it, and one integer with a bit for each room that some row has finds the least: n·log
    n for n documents, through sorting. Needs rows for at most 11/9 of the tokens' best packing (best fit decreasing, Johnson
    1974).
    """
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = rows = 0
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, rows
            rows += 1
        row_of[document] = row
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    members = np.lexsort((-lengths, row_of))
    return Rows(members, np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))]))


def joined(parts: Sequence[Rows]) -> Rows:
    """Concatenate the rows of several parts."""
    sizes = np.concatenate([np.diff(part.starts) for part in parts])
    return Rows(np.concatenate([part.members for part in parts]), np.concatenate([[0], np.cumsum(sizes)]))

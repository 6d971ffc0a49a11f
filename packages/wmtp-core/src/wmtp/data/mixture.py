"""Rows of several data sets in given shares of tokens.

Each row is a pure function of seed and number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from wmtp.data.packing import Numbers, Rows, best_fit, in_order, joined, one_each
from wmtp.errors import ConfigError

__all__ = ["Mixture"]


class Mixture:
    """Interleaves rows of several data sets by their token shares.

    A data set that has been read begins again, in a new order. A row holds documents of one data set. What counts is tokens: a
    data set whose rows are emptier gives more of them. An epoch has as many rows as all data sets together, and after each the
    shares are met to within a row.

    Args:
        lengths: tokens of each document.
        sources: for each document the number of its data set.
        names: of the data sets.
        shares: by name; only their proportions count.
        max_length: tokens in a row.
        packing: whether a row may hold several documents.
        shuffle: whether the order changes from epoch to epoch.
        seed: of the order.

    Raises:
        ConfigError: a data set has no document.
    """

    def __init__(
        self,
        lengths: Numbers,
        sources: Numbers,
        names: Sequence[str],
        shares: Mapping[str, float],
        *,
        max_length: int,
        packing: bool,
        shuffle: bool,
        seed: int,
    ) -> None:
        self._lengths = lengths
        self._names = names
        self._shuffle = shuffle
        self._seed = seed
        self._rows: list[Rows] = []
        for number, name in enumerate(names):
            documents = np.flatnonzero(sources == number)
            if not len(documents):
                raise ConfigError(f"data.train.mixture.{name}: no document of it is left to learn from; leave it out")
            fit = (best_fit if shuffle else in_order) if packing else None
            rows = one_each(np.arange(len(documents))) if fit is None else fit(lengths[documents], max_length)
            self._rows.append(Rows(documents[rows.members], rows.starts))
        self._sizes = np.array([len(rows) for rows in self._rows])
        tokens = np.array([int(lengths[rows.members].sum()) for rows in self._rows])
        wanted = np.array([shares[name] for name in names], np.float64)
        per_row = wanted / wanted.sum() * self._sizes / tokens
        self._shares, self._row_shares = wanted / wanted.sum(), per_row / per_row.sum()
        self._taken = [np.zeros(len(names), np.int64)]
        self._pass = lru_cache(maxsize=2 * len(names))(self._make_pass)

    def __len__(self) -> int:
        return int(self._sizes.sum())

    @property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return max(int(rows.lengths(self._lengths).max()) for rows in self._rows)

    def epoch(self, epoch: int) -> Rows:
        """List the rows of an epoch, from 0.

        Those of each data set are spread evenly over it.
        """
        first, end = self._before(epoch), self._before(epoch + 1)
        parts, places = [], []
        random = np.random.default_rng([self._seed, epoch, len(self._rows) + 1])
        for source, (start, stop) in enumerate(zip(first.tolist(), end.tolist(), strict=True)):
            if start == stop:
                continue
            parts.append(self._stream(source, start, stop))
            jitter = random.random(stop - start) if self._shuffle else 0.5
            places.append((np.arange(stop - start) + jitter) / (stop - start))
        return joined(parts).reordered(np.argsort(np.concatenate(places), kind="stable"))

    def epochs(self, rows: int) -> Mapping[str, tuple[float, float]]:
        """Return each data set's token share and epochs after ``rows`` rows."""
        passes = self._row_shares * rows / self._sizes
        return {name: (float(self._shares[n]), float(passes[n])) for n, name in enumerate(self._names)}

    def _before(self, epoch: int) -> NDArray[np.int64]:
        """Count the rows of each data set that come before an epoch."""
        while len(self._taken) <= epoch:
            wanted = np.maximum(self._row_shares * len(self) * len(self._taken) - self._taken[-1], 0.0)
            rows = np.floor(wanted).astype(np.int64)
            missing = len(self) - int(rows.sum())
            if missing > 0:
                rows[np.argsort(rows - wanted, kind="stable")[:missing]] += 1
            elif missing < 0:
                rows[np.argmax(rows)] += missing
            self._taken.append(self._taken[-1] + rows)
        return self._taken[epoch]

    def _stream(self, source: int, start: int, stop: int) -> Rows:
        """List rows of a data set that is read again and again."""
        size, parts = int(self._sizes[source]), []
        for number in range(start // size, (stop - 1) // size + 1):
            begin, end = max(start - number * size, 0), min(stop - number * size, size)
            parts.append(self._pass(source, number).reordered(np.arange(begin, end)))
        return joined(parts)

    def _make_pass(self, source: int, number: int) -> Rows:
        rows = self._rows[source]
        if not self._shuffle:
            return rows
        random = np.random.default_rng([self._seed, number, source + 1])
        inside = Rows(np.arange(len(rows.members)), rows.starts).exchanged(self._lengths[rows.members], random)
        return Rows(rows.members[inside.members], rows.starts).reordered(random.permutation(len(rows)))

"""Batches of any step, computed from data, config and seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import overload

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray

from wmtp.config.schema import DataConfig, TrainDataConfig
from wmtp.data.batch import PADDING, Batch
from wmtp.data.dataset import TokenDataset
from wmtp.data.groups import GroupBatches
from wmtp.data.mixture import Mixture
from wmtp.data.packing import Rows, best_fit, in_order, one_each, sorted_in_windows
from wmtp.errors import ConfigError, WMTPError

__all__ = ["EvalBatches", "StepBatches"]


@frozen(kw_only=True, eq=False)
class _Plan:
    """Rows of an epoch, their padded length, and where batches start.

    None for the length: padded batch by batch. None for the starts: every ``batch_size`` rows.
    """

    rows: Rows
    length: int | None
    starts: NDArray[np.int64] | None = None


class StepBatches:
    """Batches of a run.

    With ``packing`` the documents of an epoch go into rows best fit first (the longest document first, each into the fullest
    row that has room), and rows are shuffled. All batches of a run have the same length, ``max_length`` or, where every row is
    shorter, the longest row, so that compiled kernels are made once. Without ``packing`` a row is one document, rows of like
    length (sorted within some batches) share a batch, batches are shuffled, and a batch is as long as its longest row. Lengths
    are rounded up to a multiple of 8, from 512 on of 64, but never beyond ``max_length``. The last batch of an epoch may have
    fewer rows.

    Args:
        dataset: the training data.
        config: ``[data.train]``.
        seed: of the order.
        groups: one number for each piece of the data set: pieces with the same number share a step, those with −1 are left out.
            Where groups have several pieces a batch may have fewer rows than ``batch_size``, if the next group does not fit.
            Default: each piece for itself.

    Raises:
        ConfigError: a group is too large for a batch.
        WMTPError: there is no document.
    """

    def __init__(
        self, dataset: TokenDataset, config: TrainDataConfig, *, seed: int, groups: NDArray[np.int64] | None = None
    ) -> None:
        self._fingerprint = dataset.fingerprint
        self._groups = self._mixture = None
        if groups is not None:
            dataset, groups = dataset.select(groups >= 0), groups[groups >= 0]
        self._dataset = dataset
        self._config = config
        self._seed = seed
        lengths = dataset.lengths
        if not len(lengths):
            raise WMTPError("data.train: there is no document to make batches of")
        if config.mixture is not None:
            if groups is not None and len(np.unique(groups)) < len(groups):
                raise ConfigError(
                    "data.train.mixture: the trainer wants several documents in one step, of which a mixture takes single ones;"
                    " write data.train.sources"
                )
            self._mixture = Mixture(
                lengths, dataset.sources, dataset.names, config.mixture,
                max_length=config.max_length, packing=config.packing, shuffle=config.shuffle, seed=seed,
            )  # fmt: skip
        elif groups is not None and len(np.unique(groups)) < len(groups):
            self._groups = GroupBatches(
                lengths, groups, max_length=config.max_length, batch_size=config.batch_size, packing=config.packing
            )
            self._rows, _ = self._groups.epoch(None)
        elif not config.packing:
            self._rows = one_each(np.arange(len(lengths)))
        elif config.shuffle:
            # Documents of equal length may change places, so one packing serves every epoch.
            self._rows = best_fit(lengths, config.max_length)
        else:
            self._rows = in_order(lengths, config.max_length)
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    @property
    def fingerprint(self) -> str:
        """See `TokenDataset.fingerprint`: with the same config, seed and groups, the same batches."""
        return self._fingerprint

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in every epoch.

        All epochs have equally many: packing gives each the same number of rows.
        """
        if self._groups is not None:
            return len(self._groups)
        return -(-len(self._rows if self._mixture is None else self._mixture) // self._config.batch_size)

    def locate(self, step: int) -> tuple[int, int]:
        """Return a step's epoch and its number within it, from 0."""
        return divmod(step, self.steps_per_epoch)

    def total_steps(self, epochs: float) -> int:
        """Count the optimizer steps in ``epochs``, rounded up, at least 1."""
        return max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))

    def mixed(self, steps: int) -> Mapping[str, tuple[float, float]]:
        """Return each mixed data set's token share and epochs after ``steps``.

        Empty without a mixture.
        """
        if self._mixture is None:
            return {}
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return self._mixture.epochs(epochs * len(self._mixture) + min(rest * self._config.batch_size, len(self._mixture)))

    def batch(self, step: int) -> Batch:
        """All rows of optimizer step ``step`` (from 0), on the CPU."""
        epoch, index = self.locate(step)
        plan = self._plan(epoch if self._config.shuffle or self._mixture is not None else 0)
        size = self._config.batch_size
        first, stop = (index * size, index * size + size) if plan.starts is None else map(int, plan.starts[index : index + 2])
        return _collate(self._dataset, plan.rows, first, stop - first, plan.length, self._config.max_length)

    def _make_plan(self, epoch: int) -> _Plan:
        config, lengths = self._config, self._dataset.lengths
        if self._mixture is not None:
            rows = self._mixture.epoch(epoch)
            if config.packing:
                return _Plan(rows=rows, length=_rounded(self._mixture.longest, config.max_length))
            if config.shuffle:
                random = np.random.default_rng([self._seed, epoch])
                rows = one_each(_batches_of_like_length(lengths, rows.members, config.batch_size, random))
            return _Plan(rows=rows, length=None)
        length = _common_length(self._rows, lengths, config)
        if self._groups is not None:
            rows, starts = self._groups.epoch(np.random.default_rng([self._seed, epoch]) if config.shuffle else None)
            return _Plan(rows=rows, length=length, starts=starts)
        if not config.shuffle:
            return _Plan(rows=self._rows, length=length)
        random = np.random.default_rng([self._seed, epoch])
        if config.packing:
            rows = self._rows.exchanged(lengths, random)
            return _Plan(rows=rows.reordered(random.permutation(len(rows))), length=length)
        order = random.permutation(len(lengths))
        return _Plan(rows=one_each(_batches_of_like_length(lengths, order, config.batch_size, random)), length=length)


def _common_length(rows: Rows, lengths: NDArray[np.int64], config: TrainDataConfig) -> int | None:
    return _rounded(int(rows.lengths(lengths).max()), config.max_length) if config.packing else None


def _rounded(length: int, max_length: int) -> int:
    multiple = 8 if max_length < 512 else 64
    return min(max_length, -(-length // multiple) * multiple)


def _batches_of_like_length(
    lengths: NDArray[np.int64], order: NDArray[np.int64], batch_size: int, random: np.random.Generator
) -> NDArray[np.int64]:
    order = sorted_in_windows(order, lengths, batch_size)
    full = len(order) // batch_size * batch_size  # only the last batch of an epoch may be smaller
    batches = order[:full].reshape(-1, batch_size)
    return np.concatenate([batches[random.permutation(len(batches))].ravel(), order[full:]])


def _collate(dataset: TokenDataset, rows: Rows, first: int, count: int, length: int | None, max_length: int) -> Batch:
    numbers = [rows.row(row) for row in range(first, min(first + count, len(rows)))]
    if length is None:
        length = _rounded(max(int(dataset.lengths[row].sum()) for row in numbers), max_length)
    shape = (len(numbers), length)
    input_ids = np.full(shape, dataset.pad_id, np.int64)
    document = np.full(shape, PADDING, np.int64)
    position = np.zeros(shape, np.int64)
    loss_mask = np.zeros(shape, np.bool_)
    weight = np.zeros(shape, np.float32) if dataset.has_weights else None
    scale = np.zeros(shape, np.float32) if dataset.has_scales else None
    documents = []
    for row, members in enumerate(numbers):
        start = 0
        for number in members:
            piece = dataset.document(int(number))
            stop = start + len(piece.tokens)
            input_ids[row, start:stop] = piece.tokens
            document[row, start:stop] = len(documents)
            position[row, start:stop] = np.arange(stop - start)
            loss_mask[row, start:stop] = piece.loss_mask
            if weight is not None and piece.weight is not None:
                weight[row, start:stop] = piece.weight
            if scale is not None and piece.scale is not None:
                scale[row, start:stop] = piece.scale
            documents.append(piece.document)
            start = stop
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        document=torch.from_numpy(document),
        position=torch.from_numpy(position),
        loss_mask=torch.from_numpy(loss_mask),
        weight=None if weight is None else torch.from_numpy(weight),
        scale=None if scale is None else torch.from_numpy(scale),
        documents=documents,
    )


class EvalBatches(Sequence[Batch]):
    """Evaluation batches: every document once, in the order of the files.

    Rows are made as ``[data.train]`` says. A batch is made when it is asked for.

    Args:
        dataset: what is measured.
        config: ``[data]``.
    """

    def __init__(self, dataset: TokenDataset, config: DataConfig) -> None:
        train = config.train
        measured = config.eval
        self._dataset = dataset
        self._max_length = train.max_length
        self._size = (measured.batch_size if measured else None) or train.micro_batch_size or train.batch_size
        lengths = dataset.lengths
        self._rows = in_order(lengths, train.max_length) if train.packing else one_each(np.arange(len(lengths)))
        self._row_length = _common_length(self._rows, lengths, train)
        self._measured = len(self._rows)
        if measured and measured.max_batches is not None:
            # not of micro-batches: their size affects memory and speed, never the result
            self._measured = min(self._measured, measured.max_batches * (measured.batch_size or train.batch_size))
        self._count = -(-self._measured // self._size)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(self._count))

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"batch {index} of {self._count}")
        first = index % self._count * self._size
        size = min(self._size, self._measured - first)
        return _collate(self._dataset, self._rows, first, size, self._row_length, self._max_length)

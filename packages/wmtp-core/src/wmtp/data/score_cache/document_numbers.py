"""File of one number a document, kept between runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wmtp.data.score_cache.token_numbers import numbers_file

if TYPE_CHECKING:
    from wmtp.data.base import Document
    from wmtp.data.dataset import TokenDataset

__all__ = ["DocumentNumbers"]


class DocumentNumbers:
    """Cached score of a frozen model for each document or piece.

    Args:
        path: the file. Its name must identify all inputs of the numbers: data, text and model.
        dataset: the documents.

    Raises:
        WMTPError: the file cannot be made.
    """

    def __init__(self, path: Path, dataset: TokenDataset) -> None:
        self._dataset = dataset
        self._numbers = numbers_file(path, len(dataset))

    @property
    def values(self) -> NDArray[np.float32]:
        """All numbers, in the order of the data set; NaN if unknown."""
        return np.array(self._numbers)

    @property
    def missing(self) -> NDArray[np.int64]:
        """Pieces without a number so far."""
        return np.flatnonzero(np.isnan(self._numbers))

    def put(self, pieces: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Store the numbers of some pieces.

        They survive the end of the process at any time.
        """
        self._numbers[pieces] = values

    def of(self, document: Document) -> float:
        """Return the number of one document."""
        return float(self._numbers[self._dataset.number_of(document)])

"""File of one number a token, kept between runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wmtp.data.dataset import TokenDataset
from wmtp.errors import WMTPError
from wmtp.storage.atomic import partial_path

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp.data.batch import Batch

__all__ = ["TokenNumbers", "numbers_file"]

_PART = 2**20
_log = logging.getLogger("wmtp")


class TokenNumbers:
    """Cached numbers of a frozen model, one a token.

    They are computed when first needed. The file holds one fp32 number a token, NaN where none is known yet. Computed numbers
    survive the end of the process at any time; processes that fill the file at once write the same values, so they do not
    disturb each other.

    Args:
        path: the file. Its name must identify all inputs of the numbers: data, tokenizer and model.
        dataset: whose tokens they are.

    Raises:
        WMTPError: the file cannot be made.
    """

    def __init__(self, path: Path, dataset: TokenDataset) -> None:
        self._dataset = dataset
        self._offsets = np.cumsum(dataset.lengths) - dataset.lengths
        self._numbers = numbers_file(path, dataset.tokens)

    @property
    def complete(self) -> bool:
        """True if every number is known."""
        return not any(np.isnan(self._numbers[start : start + _PART]).any() for start in range(0, len(self._numbers), _PART))

    def get(self, batch: Batch, compute: Callable[[], Tensor]) -> Tensor:
        """Return the numbers of a batch's tokens, computing them if needed.

        Args:
            batch: rows of the data set.
            compute: returns all numbers of the batch, ``[B, S]``; called if one of them is not known, and remembered.

        Returns:
            ``[B, S]`` fp32 on the batch's device; at padding 0.
        """
        import torch

        host = batch.host or batch  # a look-up must not wait for the device
        real = (host.document >= 0).cpu().numpy()
        places = self._places(host)[real]
        known = self._numbers[places]
        if np.isnan(known).any():
            computed = compute()
            self._numbers[places] = computed.cpu().numpy()[real]
            return computed
        numbers = np.zeros(real.shape, np.float32)
        numbers[real] = known
        found, device = torch.from_numpy(numbers), batch.input_ids.device
        return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)

    def _places(self, batch: Batch) -> NDArray[np.int64]:
        """Find each token's place in the file, ``[B, S]``; undefined at padding."""
        first = self._offsets[[self._dataset.number_of(document) for document in batch.documents]]
        return first[batch.document.cpu().numpy()] + batch.position.cpu().numpy()


def numbers_file(path: Path, count: int) -> np.memmap[tuple[int], np.dtype[np.float32]]:
    """Open a file of fp32 numbers, NaN where none is known.

    A file of another size is damaged, and made again.

    Raises:
        WMTPError: the file cannot be made.
    """
    if path.exists() and path.stat().st_size != 4 * count:
        _log.warning("%s is damaged; it is made again", path)
        path.unlink()
    if not path.exists():
        _make(path, count)
    return np.memmap(path, np.float32, "r+", shape=(count,))


def _make(path: Path, count: int) -> None:
    """Write a file that knows no number yet.

    It is written in full, so that no disk gets full later.
    """
    new = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            for start in range(0, count, _PART):
                file.write(np.full(min(_PART, count - start), np.nan, np.float32).tobytes())
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise WMTPError(
            f"{path.parent}: the token cache cannot be written ({error.strerror or error}); free some space, or set "
            "data.cache_dir"
        ) from error

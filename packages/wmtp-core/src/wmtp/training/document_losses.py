"""Losses of each evaluation document, to compare runs document by document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from wmtp.data.batch import PADDING, Batch
from wmtp.loss.weights import statistics_dtype
from wmtp.storage.atomic import replace_text

__all__ = ["DocumentLosses"]

#: of more documents the file would be large, and their mean has hardly any spread
_MOST: Final = 2000


class DocumentLosses:
    """Sums of token losses by document and head.

    Args:
        batches: the evaluation data.
        horizon: H.
        device: where the losses are.
    """

    def __init__(self, batches: Sequence[Batch], horizon: int, device: torch.device) -> None:
        indexes = {document.index for batch in batches for document in batch.documents}
        self._row = {index: row for row, index in enumerate(sorted(indexes))}
        #: ``[2, documents, H]``: losses, and how many; to be added up over ranks
        self.sums = torch.zeros(2, len(indexes), horizon, dtype=statistics_dtype(device), device=device)

    def add(self, batch: Batch, losses: Tensor, valid: Tensor) -> None:
        """Add a batch's losses ``[B, S, H]``, 0 where not ``valid``."""
        row = torch.tensor([self._row[document.index] for document in batch.documents], device=valid.device)
        document = batch.document.flatten()
        there = document != PADDING
        for sums, values in zip(self.sums, (losses, valid), strict=True):
            sums.index_add_(0, row[document[there]], values.flatten(0, 1)[there].to(sums.dtype))

    def write(self, path: Path) -> None:
        """Write the sums as JSON, by head and document.

        ``{"head_k": [[sum, …], [count, …]]}``, with the documents in the order of the data. There is no file for more than
        2,000 documents.
        """
        if len(self._row) > _MOST:
            return
        losses, counts = self.sums.tolist()
        found = {
            f"head_{k + 1}": [[float(f"{one[k]:.6g}") for one in losses], [int(one[k]) for one in counts]]
            for k in range(self.sums.shape[-1])
        }
        replace_text(path, json.dumps(found, separators=(",", ":")) + "\n")

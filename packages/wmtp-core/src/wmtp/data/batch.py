"""Batches of token rows, and the prediction targets of every head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from wmtp.data.base import Document

__all__ = ["PADDING", "Batch", "Document", "Targets", "align_targets", "shift_to_predictions"]

#: the document number of places that are padding
PADDING = -1


@frozen(kw_only=True, eq=False)
class Batch:
    """Rows of tokens.

    Args:
        input_ids: ``[B, S]`` int64; padding holds any valid id.
        document: ``[B, S]`` int64, for each place the number of its document in ``documents``, or `PADDING`.
        position: ``[B, S]`` int64, the place inside the document's piece, from 0.
        loss_mask: ``[B, S]`` bool, whether the token is one to learn (not prompt, not padding; end-of-sequence is).
        weight: ``[B, S]`` float32, the data's own weight of each token; None where no document has any.
        scale: ``[B, S]`` float32, a factor of the trainer's weights, applied by the loop; None where it is 1.
        documents: identity and labels of each document in the batch.
        host: the same rows on the CPU, where these are on another device, for look-ups without waiting for the device.
    """

    input_ids: Tensor
    document: Tensor
    position: Tensor
    loss_mask: Tensor
    documents: Sequence[Document]
    weight: Tensor | None = None
    scale: Tensor | None = None
    host: Batch | None = None

    if not TYPE_CHECKING:  # else a checker of types would take every name

        def __getattr__(self, name: str) -> Any:
            now = "; it is called loss_mask now" if name == "learn" else ""
            raise AttributeError(f"a Batch has no {name!r}{now}", name=name, obj=self)

    @property
    def packed(self) -> bool:
        """True if some row holds more than one document.

        Reads only the CPU copy: call it before `to`.
        """
        starts = (self.position == 0) & (self.document != PADDING)
        return bool((starts.sum(dim=1) > 1).any())

    def rows(self, start: int, stop: int) -> Batch:
        """Slice rows ``start`` to ``stop``; document numbers keep their meaning."""
        part = self._each(lambda tensor: tensor[start:stop])
        return part if self.host is None else evolve(part, host=self.host.rows(start, stop))

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to ``device``; copies from pinned memory do not block."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        return moved if device.type == "cpu" else evolve(moved, host=self)

    def pinned(self) -> Batch:
        """Copy the batch to page-locked memory.

        From there, `to` a GPU does not block.
        """
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return evolve(
            self,
            input_ids=change(self.input_ids),
            document=change(self.document),
            position=change(self.position),
            loss_mask=change(self.loss_mask),
            weight=None if self.weight is None else change(self.weight),
            scale=None if self.scale is None else change(self.scale),
        )


@frozen(kw_only=True, eq=False)
class Targets:
    """Prediction targets of every head.

    Args:
        ids: ``[B, S, H]`` int64, the token x[t+k] that head k predicts at t; 0 where there is none.
        valid: ``[B, S, H]`` bool, m[t, k]: the target is inside the row, inside the same document, and a token to learn.
    """

    ids: Tensor
    valid: Tensor


def align_targets(batch: Batch, horizon: int) -> Targets:
    """Align the targets of heads 1..H.

    Head k at position t predicts the token at t+k.

    Args:
        batch: rows of S tokens.
        horizon: H; heads beyond the row's end have no valid target.

    Returns:
        ids and valid mask, ``[B, S, H]``.
    """
    ids = shift_to_predictions(batch.input_ids, horizon)
    loss_mask = shift_to_predictions(batch.loss_mask, horizon)
    # PADDING − 1 differs from every document number, padding included
    document = shift_to_predictions(batch.document, horizon, fill=PADDING - 1)
    return Targets(ids=ids, valid=loss_mask & (document == batch.document.unsqueeze(-1)))


def shift_to_predictions(by_token: Tensor, horizon: int, fill: float = 0) -> Tensor:
    """Move a value of each token to all predictions of it.

    ``out[b, t, k−1] = by_token[b, t+k]``.

    Args:
        by_token: ``[B, S]``.
        horizon: H.
        fill: the value where t+k is beyond the row's end.

    Returns:
        ``[B, S, H]``.
    """
    rows, length = by_token.shape
    out = by_token.new_full((rows, length, horizon), fill)
    for k in range(1, min(horizon, length - 1) + 1):
        out[:, : length - k, k - 1] = by_token[:, k:]
    return out

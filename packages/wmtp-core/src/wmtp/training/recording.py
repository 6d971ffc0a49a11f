"""Records of a step for ``wmtp report``: distribution of weights, and texts.

``weights.jsonl`` has one object a recorded step: ``counts``, for each head how many predictions had a weight in each of the
`WEIGHT_BINS`. ``samples.jsonl`` has one object a step from which texts are recorded: ``stage``; ``mean_weight``, of the whole
step; and ``documents``, a list of

- ``index``, ``start``, ``id``, ``is_correct``, ``reward``: see `wmtp.data.Document`;
- ``tokens``: the text of each token;
- ``weight`` (null in a stage without weights) and ``loss``: for each head one number a token, the one of that head's
  prediction *of* the token, null where it makes none;
- ``details``: what `Trainer.token_details` gave, by name: one number a token, or for each head one number a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import Tensor

from wmtp.tokenizers.texts import token_texts

if TYPE_CHECKING:
    from wmtp.data.batch import Batch
    from wmtp.tokenizers import Tokenizer

__all__ = ["Place", "Recording", "TokenRecord", "document_record"]


@frozen(kw_only=True, eq=False)
class TokenRecord:
    """Per-token numbers of a step, still on the device.

    Args:
        weights: ``[B, S, H]``; None in a stage without weights.
        losses: CE, ``[B, S, H]``.
        valid: ``[B, S, H]`` bool.
        details: ``[B, S]`` or ``[B, S, H]`` each, by name.
    """

    weights: Tensor | None
    losses: Tensor
    valid: Tensor
    details: Mapping[str, Tensor]


@frozen(kw_only=True)
class Place:
    """Tokens of a document in a batch.

    Args:
        number: of the document there.
        row: of the batch.
        start: its first token.
        stop: the one after the last that is recorded.
    """

    number: int
    row: int
    start: int
    stop: int


@frozen(kw_only=True)
class Recording:
    """Choice of what is recorded of one step.

    Args:
        weights: whether the distribution of weights is.
        documents: the documents whose tokens are.
    """

    weights: bool
    documents: Sequence[Place]


def document_record(batch: Batch, place: Place, record: TokenRecord, tokenizer: Tokenizer) -> dict[str, Any]:
    """Make the object of one document in ``samples.jsonl``."""
    row, inside = place.row, slice(place.start, place.stop)
    document = batch.documents[place.number]
    valid = record.valid[row, inside].cpu()
    learned = batch.loss_mask[row, inside]
    details = {}
    for name, value in record.details.items():
        values = value[row, inside].detach().float().cpu()
        details[name] = _by_target(values, valid) if values.ndim == 2 else _numbers(values, learned)
    return {
        "index": document.index,
        "start": document.start,
        "id": document.id,
        "is_correct": document.is_correct,
        "reward": document.reward,
        "tokens": token_texts(tokenizer, batch.input_ids[row, inside].tolist()),
        "weight": None if record.weights is None else _by_target(record.weights[row, inside].cpu(), valid),
        "loss": _by_target(record.losses[row, inside].cpu(), valid),
        "details": details,
    }


def _by_target(values: Tensor, valid: Tensor) -> list[list[float | None]]:
    """Turn predictions ``[L, H]`` into H lists, one number a token.

    In list k, place j holds head k's prediction of token j, made at j − k.
    """
    length, horizon = values.shape
    return [
        [None] * min(k, length) + _numbers(values[: max(0, length - k), k - 1], valid[: max(0, length - k), k - 1])
        for k in range(1, horizon + 1)
    ]


def _numbers(values: Tensor, known: Tensor) -> list[float | None]:
    """Round to four digits: enough to look at, and small files."""
    return [
        float(f"{value:.4g}") if there and math.isfinite(value) else None
        for value, there in zip(values.tolist(), known.tolist(), strict=True)
    ]

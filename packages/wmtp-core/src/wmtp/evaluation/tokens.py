"""Per-token results of every head on the evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmtp.data.batch import align_targets
from wmtp.evaluation.base import Estimate, Measured
from wmtp.evaluation.bootstrap import Bootstrap
from wmtp.loss import Unembedding, token_losses

__all__ = ["by_bucket", "token_results"]

#: places of the predicted token in its document; the last bucket has no end
POSITIONS: Final = (0, 32, 128, 512, 2048)
#: shares of all predicted tokens that the most frequent ones, the next, and the rest make up
FREQUENCIES: Final = (("common", 0.5), ("medium", 0.9), ("rare", 1.0))

#: of one batch: hidden states and unembeddings of all heads, targets and their validity → a value for each, ``[B, S, H]``
Value = Callable[[tuple[Tensor, ...], list[Unembedding], Tensor, Tensor], Tensor]

losses: Value = token_losses


def correct(hidden: tuple[Tensor, ...], unembeddings: list[Unembedding], ids: Tensor, valid: Tensor) -> Tensor:
    """1 where a head's most probable token is the right one."""
    values = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    for k, (states, unembedding) in enumerate(zip(hidden, unembeddings, strict=True)):
        for row in range(len(ids)):  # the logits of one row at a time
            wanted = valid[row, :, k]
            best = unembedding.logits(states[row, wanted]).argmax(-1)
            values[row, wanted, k] = (best == ids[row, wanted, k]).float()
    return values


@torch.no_grad()
def token_results(
    measured: Measured, value: Value, transform: Callable[[NDArray], NDArray] | None = None
) -> Mapping[str, Estimate]:
    """Average a value over valid predictions, with intervals over documents.

    The result does not depend on the batches.

    Args:
        measured: the model and the data.
        value: what is averaged.
        transform: applied to every mean.

    Returns:
        ``head_k``, ``head_k/position/A-B`` (the predicted token's place in its document) and ``head_k/frequency/…`` (how common
        the predicted token is in this data: ``common`` tokens make up half of it, ``medium`` ones the next 40 %).
    """
    # where several processes hold the model, each of them goes over all batches
    parts = [np.concatenate(column) for column in zip(*_predictions(measured, value), strict=True)]
    if not parts or not len(parts[0]):
        return {}
    document, head, position, token, values = parts
    _, document = np.unique(document, return_inverse=True)
    documents = int(document.max()) + 1
    bootstrap = Bootstrap(documents, "documents", measured.seed)

    def estimate(chosen: NDArray[np.bool_]) -> Estimate:
        sums = np.bincount(document[chosen], weights=values[chosen], minlength=documents)
        return bootstrap.ratio(sums, np.bincount(document[chosen], minlength=documents), transform=transform)

    places = np.searchsorted(POSITIONS, position, side="right") - 1
    kinds = by_bucket(token, head)
    results: dict[str, Estimate] = {}
    for k in range(int(head.max()) + 1):
        own = head == k
        if not own.any():
            continue
        results[f"head_{k + 1}"] = estimate(own)
        for place, start in enumerate(POSITIONS):
            end = f"-{POSITIONS[place + 1] - 1}" if place + 1 < len(POSITIONS) else "+"
            if (chosen := own & (places == place)).any():
                results[f"head_{k + 1}/position/{start}{end}"] = estimate(chosen)
        for kind, (name, _) in enumerate(FREQUENCIES):
            if (chosen := own & (kinds == kind)).any():
                results[f"head_{k + 1}/frequency/{name}"] = estimate(chosen)
    return results


def by_bucket(token: NDArray[np.int64], head: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the frequency bucket of each predicted token.

    Frequencies are those of head 1's targets.
    """
    size = int(token.max()) + 1
    counts = np.bincount(token[head == 0], minlength=size)
    order = np.argsort(-counts, kind="stable")
    # a token belongs where the tokens more frequent than it end
    before = np.cumsum(counts[order]) - counts[order]
    shares = np.array([share for _, share in FREQUENCIES[:-1]]) * counts.sum()
    bucket = np.empty(size, np.int64)
    bucket[order] = np.searchsorted(shares, before, side="right")
    return bucket[token]


def _predictions(measured: Measured, value: Value) -> Iterator[tuple[NDArray, NDArray, NDArray, NDArray, NDArray]]:
    """Yield arrays about the valid predictions of each batch.

    Document, head from 0, the target's place in the document, target, value.
    """
    model = measured.model
    unembeddings = [model.unembedding(k) for k in range(1, model.horizon + 1)]
    for batch in measured.batches:
        if measured.ranks is not None:
            measured.ranks.tick("evaluation")
        packed = batch.packed
        on_device = batch.to(measured.device)
        targets = align_targets(on_device, model.horizon)
        with measured.autocast():
            output = model(on_device.input_ids, on_device.position, packed)
            values = value(output.hidden, unembeddings, targets.ids, targets.valid)
        valid = targets.valid.cpu().numpy()
        row, place, head = np.nonzero(valid)
        number = batch.document.numpy()[row, place]
        indices = np.array([document.index for document in batch.documents])
        starts = np.array([document.start for document in batch.documents])
        yield (
            indices[number],
            head,
            starts[number] + batch.position.numpy()[row, place] + head + 1,
            targets.ids.cpu().numpy()[valid],
            values.cpu().double().numpy()[valid],
        )

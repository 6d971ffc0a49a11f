"""Loss of every head on the evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from attrs import evolve

from wmtp.data.batch import Batch, align_targets
from wmtp.distributed.ranks import SINGLE_PROCESS, Ranks
from wmtp.loss import head_agreement, token_losses
from wmtp.loss.weights import statistics_dtype
from wmtp.training.agreement import DraftSums

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel
    from wmtp.training.document_losses import DocumentLosses

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: MTPModel,
    batches: Sequence[Batch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    ranks: Ranks = SINGLE_PROCESS,
    documents: DocumentLosses | None = None,
) -> dict[str, float]:
    """Mean token losses over all valid predictions, whatever the batches.

    Args:
        model: in eval mode.
        batches: on the CPU, the same on every rank.
        device: where the model is.
        autocast: makes the context in which the model computes.
        ranks: the processes that share the batches; every one of them must call this, and gets all of the result.
        documents: is given the losses by document.

    Returns:
        ``eval/loss/head_k``, the unweighted mean of head k; ``eval/loss``, their mean over all heads by α and number of
        predictions, which is the training loss of uniform weights; ``eval/predictions``, the number for head 1. With heads 2..H
        also ``eval/acceptance/head_k``, ``eval/top1/head_k``, ``eval/accepted/depth_d`` and ``eval/tokens_per_forward``: see
        `DraftSums`. What has no valid prediction is left out.
    """
    dtype = statistics_dtype(device)
    sums = torch.zeros(model.horizon, dtype=dtype, device=device)
    counts = torch.zeros(model.horizon, dtype=dtype, device=device)
    drafts = DraftSums(model.horizon, device)
    for batch in _share(batches, ranks):
        ranks.tick_within_step("evaluation")
        packed = batch.packed
        on_device = batch.to(device)
        targets = align_targets(on_device, model.horizon)
        with autocast():
            output = model(on_device.input_ids, on_device.position, packed)
            # where the model is divided, its unembedding is whole only now
            unembeddings = [model.unembedding(k) for k in range(1, model.horizon + 1)]
            if model.horizon == 1:
                losses = token_losses(output.hidden, unembeddings, targets.ids, targets.valid)
            else:
                found = head_agreement(output.hidden, unembeddings, targets.ids, targets.valid)
                losses = found.token_losses
                drafts.add(found, targets.valid)
        if documents is not None:
            documents.add(on_device, losses, targets.valid)
        sums += losses.to(dtype).sum((0, 1))
        counts += targets.valid.sum((0, 1))
    ranks.sum(sums)
    ranks.sum(counts)
    ranks.sum(drafts.sums)
    if documents is not None:
        ranks.sum(documents.sums)
    head_weights = torch.tensor(model.heads.resolved_head_weights(), dtype=dtype, device=device)
    total = (sums * head_weights).sum() / (counts * head_weights).sum()
    heads = {f"eval/loss/head_{k + 1}": sums[k] / counts[k] for k in range(model.horizon)}
    agreement = {} if model.horizon == 1 else {f"eval/{name}": value for name, value in drafts.means().items()}
    values = {name: float(value) for name, value in {"eval/loss": total, **heads, **agreement}.items()}
    return {name: value for name, value in values.items() if value == value} | {"eval/predictions": float(counts[0])}


def _share(batches: Sequence[Batch], ranks: Ranks) -> Iterator[Batch]:
    """Yield every ``world_size``-th batch, as many on every rank.

    Ranks that would run out get a batch with nothing to measure.
    """
    for first in range(0, len(batches), ranks.world_size):
        if (index := first + ranks.rank) < len(batches):
            yield batches[index]
        else:
            yield evolve(batches[0], loss_mask=torch.zeros_like(batches[0].loss_mask))

"""The loss of every head on the evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from wmtp.data.batch import Batch, align_targets
from wmtp.loss import token_losses
from wmtp.training.devices import statistics_dtype

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: MTPModel,
    batches: Iterable[Batch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, float]:
    """Mean token losses over all valid predictions, whatever the batches.

    Returns:
        ``eval/loss/head_k``, the unweighted mean of head k; ``eval/loss``, their mean over all heads by α and number of
        predictions, which is the training loss of uniform weights; ``eval/predictions``, the number for head 1. Heads without
        any valid prediction are left out.
    """
    dtype = statistics_dtype(device)
    sums = torch.zeros(model.horizon, dtype=dtype, device=device)
    counts = torch.zeros(model.horizon, dtype=dtype, device=device)
    unembeddings = [model.unembedding(k) for k in range(1, model.horizon + 1)]
    for batch in batches:
        packed = batch.packed
        on_device = batch.to(device)
        targets = align_targets(on_device, model.horizon)
        with autocast():
            output = model(on_device.input_ids, on_device.position, packed)
            losses = token_losses(output.hidden, unembeddings, targets.ids, targets.valid)
        sums += losses.to(dtype).sum((0, 1))
        counts += targets.valid.sum((0, 1))
    head_weights = torch.tensor(model.heads.resolved_head_weights(), dtype=dtype, device=device)
    total = (sums * head_weights).sum() / (counts * head_weights).sum()
    heads = {f"eval/loss/head_{k + 1}": sums[k] / counts[k] for k in range(model.horizon)}
    values = {name: float(value) for name, value in {"eval/loss": total, **heads}.items()}
    return {name: value for name, value in values.items() if value == value} | {"eval/predictions": float(counts[0])}

"""Learning rate, gradient norm and clipping of one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wmtp.optim.master_adamw import MasterAdamW

if TYPE_CHECKING:
    from wmtp.config.schema import ScheduleConfig

__all__ = ["clip_gradients", "gradient_norm", "learning_rate_factor"]


def learning_rate_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Compute the factor of the peak learning rate at one optimizer step.

    A pure function of the step, so that a resumed run cannot differ. The warm-up ends, and the decay begins, at 1; the decay
    would be at ``min_ratio`` one step after the last, so that the last step still learns where that is 0.

    Args:
        schedule: its shape.
        step: the optimizer step, from 0.
        total_steps: of the whole job.
    """
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.floor((schedule.warmup_ratio or 0.0) * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.type == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    falling = 1.0 - progress if schedule.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * falling


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Compute the 2-norm of all gradients over all ranks.

    It is a scalar on the device. Parameters may be whole on every rank or sharded.
    """
    parts = []
    for group in _by_kind(parameters):
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        if gradients[0].dtype == torch.bfloat16:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)))
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        parts.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))


def clip_gradients(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Clip the gradients to ``max_norm`` where their ``norm`` is larger.

    It happens now, or within the optimizer's next step.
    """
    if isinstance(optimizer, MasterAdamW):
        optimizer.clip(max_norm, norm)
        return
    for group in _by_kind(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)


def _by_kind(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Separate sharded, whole and bf16 gradients.

    torch's functions for many tensors take one kind at a time.
    """
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kind = not isinstance(parameter.grad, DTensor), parameter.grad.dtype == torch.bfloat16
            kinds.setdefault(kind, []).append(parameter)
    return [kinds[kind] for kind in sorted(kinds)]

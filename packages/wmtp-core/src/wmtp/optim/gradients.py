"""The norm of a gradient, and clipping to it, whether parameters are whole on every rank or divided among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wmtp.optim.master_adamw import MasterAdamW

__all__ = ["clip_gradients", "gradient_norm"]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, over all ranks: a scalar on the device."""
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
    """Scale the gradients down to ``max_norm`` where their ``norm`` is larger: now, or within the optimizer's next step."""
    if isinstance(optimizer, MasterAdamW):
        optimizer.clip(max_norm, norm)
        return
    for group in _by_kind(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)


def _by_kind(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divided, whole and bf16 gradients apart: torch's functions for many tensors take one kind at a time."""
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kind = not isinstance(parameter.grad, DTensor), parameter.grad.dtype == torch.bfloat16
            kinds.setdefault(kind, []).append(parameter)
    return [kinds[kind] for kind in sorted(kinds)]

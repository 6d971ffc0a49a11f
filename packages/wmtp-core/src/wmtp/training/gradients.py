"""The norm of a gradient, and clipping to it, whether parameters are whole on every rank or divided among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["clip_gradients", "gradient_norm"]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, over all ranks: a scalar on the device."""
    parts = []
    for group in _by_kind(parameters):
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in group if parameter.grad is not None])
        parts.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients down to ``max_norm`` where their ``norm`` is larger."""
    for group in _by_kind(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)


def _by_kind(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Whole and divided parameters apart: torch's functions for many tensors take one kind at a time."""
    divided = [parameter for parameter in parameters if isinstance(parameter.grad, DTensor)]
    whole = [parameter for parameter in parameters if not isinstance(parameter.grad, DTensor)]
    return [group for group in (divided, whole) if group]

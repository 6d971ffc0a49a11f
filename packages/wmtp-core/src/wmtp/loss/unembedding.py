"""From hidden states to logits."""

from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

__all__ = ["Unembedding"]


@define(kw_only=True, eq=False, slots=False)  # torch.compile traces no frozen classes of attrs
class Unembedding:
    """From hidden states to logits: ``softcap(scale · (hidden @ weight.T + bias))``.

    Args:
        weight: ``[V, D]``.
        bias: ``[V]`` or None.
        scale: the factor of the logits (Cohere, Granite), 1 for most models.
        softcap: c in ``c · tanh(logits / c)`` (Gemma 2); None for most models.
        divides: the model divides by ``1 / scale`` instead of multiplying, which rounds differently.
        float32: the model turns its logits into fp32 before it scales and caps them.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    divides: bool = False
    float32: bool = False

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits ``[..., V]`` of hidden states ``[..., D]``.

        They are exactly those of the model.
        """
        return self.transform(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def transform(self, logits: Tensor) -> Tensor:
        """Scale and cap ``hidden @ weight.T + bias``."""
        if self.float32:
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits / (1.0 / self.scale) if self.divides else logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

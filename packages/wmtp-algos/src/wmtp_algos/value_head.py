"""Value head: the expected reward from a text's hidden state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ValueHead"]


class ValueHead(nn.Module):
    """Value head: a two-layer perceptron, always in fp32.

    V = w₂ · silu(W₁ · layernorm(h) + b₁) + b₂.

    Args:
        hidden_size: D.
        width: of the hidden layer.
        seed: of its weights; the global random state stays as it is.
    """

    def __init__(self, hidden_size: int, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.SiLU(), nn.Linear(width, 1)
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute the values ``[...]`` of hidden states ``[..., D]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.layers(hidden.float()).squeeze(-1)

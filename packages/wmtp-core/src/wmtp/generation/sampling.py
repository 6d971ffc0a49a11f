"""Probabilities, and draws from them that depend on the row alone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Final

import numpy as np
import torch
from torch import Tensor

from wmtp.generation.base import Sampling

__all__ = ["Draws", "draw", "probabilities"]

#: least temperature and share: fp32 divides by smaller ones to infinity, or takes them for 0
_LEAST: Final = 1e-30


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Compute the sampling distribution: softmax at the temperature, cut to the nucleus.

    Returns:
        ``[..., V]`` fp32.
    """
    probs = torch.softmax(logits.float() / max(sampling.temperature, _LEAST), dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        # a token stays if those more probable than it do not reach top_p without it
        outside = ordered.cumsum(-1) - ordered >= max(sampling.top_p, _LEAST)
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw indices from weights ``[..., V]`` by inverse transform sampling.

    The weights need not add up to 1; ``uniform`` ``[...]`` is in [0, 1).
    """
    cumulative = probs.double().cumsum(-1) if probs.device.type == "cpu" else probs.cumsum(-1)
    wanted = (uniform.to(cumulative.dtype) * cumulative[..., -1])[..., None]
    index = torch.searchsorted(cumulative, wanted, right=True)[..., 0]
    # rounding may ask for more than there is: that is the last token with any probability
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)
    return torch.minimum(index, last)


class Draws:
    """Uniform numbers, from a stream of its own for each row.

    Args:
        seed: of all.
        rows: the rows' own numbers.
    """

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        self._streams = [np.random.default_rng([seed, row]) for row in rows]

    def __call__(self, count: int, device: torch.device) -> Tensor:
        """``[B, count]`` numbers in [0, 1)."""
        numbers = np.stack([stream.random(count) for stream in self._streams])
        if device.type == "cpu":
            return torch.from_numpy(numbers)
        return torch.from_numpy(np.minimum(numbers, np.nextafter(np.float32(1), np.float32(0))).astype(np.float32)).to(device)

    def with_rows(self, rows: Sequence[int]) -> Draws:
        """Give the streams of some rows; they are the same streams."""
        given = copy(self)
        given._streams = [self._streams[row] for row in rows]
        return given

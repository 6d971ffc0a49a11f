"""Running means on the device, which never wait for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wmtp.loss.weights import statistics_dtype

__all__ = ["RunningMean"]


class RunningMean:
    """Exponential moving average, unbiased from the first step on.

    After n updates it is Σ d^(n−i) x_i / Σ d^(n−i).

    Args:
        decay: d; 0 gives the last numbers.
        count: how many numbers.
        device: where they are.
    """

    def __init__(self, decay: float, count: int, device: torch.device) -> None:
        self._decay = decay
        self._sums = torch.zeros(count + 1, dtype=statistics_dtype(device), device=device)  # the last is the sum of the factors

    def update(self, values: Tensor, known: Tensor) -> Tensor:
        """Add numbers.

        Args:
            values: ``[count]``.
            known: scalar bool; False leaves everything as it is.

        Returns:
            ``[count]``, the means; 0 before any number was added.
        """
        added = torch.cat([values.detach().to(self._sums.dtype), torch.ones_like(self._sums[:1])])
        changed = self._decay * self._sums + (1 - self._decay) * added
        self._sums = torch.where(known, changed, self._sums)
        factors = self._sums[-1]
        return torch.where(factors > 0, self._sums[:-1] / factors, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._sums = state["sums"].to(self._sums)

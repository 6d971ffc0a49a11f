"""Remembers which checkpoint measures best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmtp.config.schema import CheckpointConfig, TrainConfig

__all__ = ["Best"]


class Best:
    """Best value of a metric so far, and its step.

    The metric is that of ``checkpoints.best``, else the one of ``[data.eval]`` by which the run stops early; without either
    nothing is remembered.

    Args:
        checkpoints: names the metric.
        train: has the early stopping.
    """

    def __init__(self, checkpoints: CheckpointConfig, train: TrainConfig) -> None:
        stopping = train.early_stopping
        self.metric: str | None = checkpoints.best
        self._mode = checkpoints.best_mode
        if self.metric is None and stopping is not None and stopping.metric.startswith("eval/"):
            self.metric, self._mode = stopping.metric, stopping.mode
        self.step: int | None = None
        self.value: float | None = None

    def better(self, numbers: Mapping[str, float]) -> float | None:
        """Return the metric's value if it is the best so far."""
        value = None if self.metric is None else numbers.get(self.metric)
        if value is None or self.value is None:
            return value
        return value if (value < self.value if self._mode == "min" else value > self.value) else None

    def take(self, step: int, value: float) -> None:
        """Remember a better value."""
        self.step, self.value = step, value

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4g} at step {self.step}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"step": self.step, "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.step, self.value = state["step"], state["value"]

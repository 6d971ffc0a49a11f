"""Stopping when a metric no longer gets better."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wmtp.spelling import did_you_mean

if TYPE_CHECKING:
    from wmtp.config.schema import EarlyStoppingConfig

__all__ = ["EarlyStopping"]

logger = logging.getLogger("wmtp")


class EarlyStopping:
    """Counts measurements without progress.

    Args:
        config: what to watch; None never stops.
        key: what a message calls it.
    """

    def __init__(self, config: EarlyStoppingConfig | None, key: str = "train.early_stopping.metric") -> None:
        self._config = config
        self._key = key
        self._best: float | None = None
        self._without_progress = 0
        self._missed = False

    def should_stop(self, metrics: Mapping[str, float]) -> bool:
        """Take the metrics of one step; return True to end the run."""
        if self._config is None:
            return False
        if self._config.metric not in metrics:
            self._say_missing(self._config.metric, metrics)
            return False
        value = metrics[self._config.metric]
        sign = 1.0 if self._config.mode == "min" else -1.0
        if self._best is None or sign * (self._best - value) > self._config.min_delta:
            self._best = value
            self._without_progress = 0
        else:
            self._without_progress += 1
        return self.exhausted

    def _say_missing(self, metric: str, metrics: Mapping[str, float]) -> None:
        """Warn once that a step's metrics lack the watched one.

        It is no error: a later stage may have metrics of its own.
        """
        alike = [name for name in metrics if name.startswith("eval/") == metric.startswith("eval/")]
        if self._missed or self._best is not None or not alike:
            return
        self._missed = True
        hint = did_you_mean(metric, alike) or f"there are {', '.join(alike)}"
        logger.warning("%s: nothing has measured %r so far; %s", self._key, metric, hint)

    @property
    def exhausted(self) -> bool:
        """True once the patience has run out; still true after a resume."""
        return self._config is not None and self._without_progress >= self._config.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"best": self._best, "without_progress": self._without_progress}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._best = state["best"]
        self._without_progress = state["without_progress"]

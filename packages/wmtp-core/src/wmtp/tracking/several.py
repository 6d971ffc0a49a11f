"""Several trackers at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from wmtp.errors import described
from wmtp.plugins.failures import plugin_failure
from wmtp.tracking.base import RunInfo, Tracker
from wmtp.tracking.ending import AFTER_CTRL_C, within

__all__ = ["Several"]

logger = logging.getLogger("wmtp")


class Several(Tracker):
    """Hands everything on to each tracker, whatever happens to the others.

    Args:
        trackers: by their type.

    Attributes:
        asked: which of them is called just now; None: none.
    """

    ends_by_itself = True  # each is left behind alone
    asked: Tracker | None = None

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = trackers
        self._failed: set[str] = set()

    def start(self, run: RunInfo) -> None:
        """Start them all.

        Where one cannot be used, those before it are closed.
        """
        started: dict[str, Tracker] = {}
        try:
            for name, tracker in self._trackers.items():
                tracker.start(run)
                started[name] = tracker
        except BaseException:
            self._trackers = started
            self.finish("failed", None)
            raise

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        self._each(lambda tracker: tracker.log(step, dict(metrics)))

    def log_artifact(self, file: Path) -> None:
        """Take a file of the run."""
        self._each(lambda tracker: within(tracker, lambda: tracker.log_artifact(file)))

    def saved(self, step: int) -> None:
        """Take note of a checkpoint."""
        self._each(lambda tracker: tracker.saved(step))

    def finish(self, status: Literal["finished", "stopped", "interrupted", "failed"], model: Path | None) -> None:
        """Close them all.

        Ctrl-C ends the wait for one; the others are closed yet, in little time.
        """
        stopped: KeyboardInterrupt | None = None

        def close(tracker: Tracker) -> None:
            nonlocal stopped
            try:
                within(tracker, lambda: tracker.finish(status, model), patience=None if stopped is None else AFTER_CTRL_C)
            except KeyboardInterrupt as error:
                stopped = error

        self._each(close)
        if stopped is not None:
            raise stopped

    def location(self) -> str | None:
        """Join the locations in one line."""
        return "; ".join(place for tracker in self._trackers.values() if (place := tracker.location())) or None

    def _each(self, tell: Callable[[Tracker], object]) -> None:
        for name, tracker in self._trackers.items():
            self.asked = tracker
            try:
                tell(tracker)
            except Exception as error:
                if name not in self._failed:
                    said = plugin_failure(error) or described(error)
                    logger.warning("the tracker %s failed: %s; metrics.jsonl has everything", name, said)
                self._failed.add(name)
            finally:
                self.asked = None

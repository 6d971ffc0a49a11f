"""Where the numbers of a step go: the file of the run, the tracker, and what a person sees."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from wmtp.runs.step_file import StepFile
from wmtp.tracking import Tracker
from wmtp.training.progress import Progress

__all__ = ["StepLog"]

logger = logging.getLogger("wmtp")


class StepLog:
    """Writes what is known of steps; on rank 0 alone.

    Args:
        path: ``metrics.jsonl``.
        tracker: is told too. Its mistakes never end a run: the file has everything.
        start: optimizer steps done already.
        total: those of the whole job.
    """

    def __init__(self, path: Path, tracker: Tracker, *, start: int, total: int) -> None:
        self._file = StepFile(path, start)
        self._tracker = tracker
        self._progress = Progress(total, start)
        self._tracker_failed = False

    def write(self, step: int, values: Mapping[str, float | str], numbers: Mapping[str, float], *, shown: bool) -> None:
        """Write a step.

        Args:
            step: optimizer steps done with it.
            values: everything that is known of it.
            numbers: those of the values that are finite numbers.
            shown: whether a person must see it; else only now and then.
        """
        self._file.write(step, values)
        self.track(step, numbers)
        self._progress.show(step, numbers, always=shown)

    def track(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell the tracker only."""
        self._tell(step, lambda: self._tracker.log(step, dict(numbers)))

    def saved(self, step: int) -> None:
        """Tell the tracker of a checkpoint."""
        self._tell(step, lambda: self._tracker.saved(step))

    def close(self) -> None:
        """Nothing more comes."""
        self._progress.close()
        self._file.close()

    def _tell(self, step: int, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception as error:
            if not self._tracker_failed:
                logger.warning("the tracker failed at step %d: %s; metrics.jsonl has everything", step, error)
            self._tracker_failed = True

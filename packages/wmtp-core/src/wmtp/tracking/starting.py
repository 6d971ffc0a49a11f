"""A tracker that starts in a thread, while the model loads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from wmtp.tracking.base import RunInfo, Tracker, failure, title
from wmtp.tracking.ending import within

__all__ = ["StartingTracker", "starting_beside"]

logger = logging.getLogger("wmtp")

#: seconds after which the log says what is waited for
_SAID_AFTER: Final = 30.0
#: seconds that a tracker has to start, and to end, when the run has failed meanwhile
_PATIENCE: Final = 10.0


@contextmanager
def starting_beside(tracker: Tracker, run: RunInfo) -> Iterator[StartingTracker]:
    """Start a tracker beside what happens inside.

    If that fails, the tracker is told so.

    Args:
        tracker: starts in a thread if it can, else where `StartingTracker.wait` is called.
        run: see `Tracker.start`.
    """
    starting = StartingTracker(tracker, run)
    try:
        yield starting
    except BaseException:
        starting.abandon()
        raise


@contextmanager
def _said_when_slow(tracker: Tracker) -> Iterator[None]:
    """Say what the run waits for, where a start takes long."""
    said = "waiting for %s to start; Ctrl-C ends the run"
    timer = threading.Timer(_SAID_AFTER, logger.warning, (said, title(tracker)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class StartingTracker:
    """Start of a tracker that is under way.

    Importing a tracker's package and opening its database takes seconds, and so does loading a model: neither needs the other.

    Args:
        tracker: starts at once, in a thread if it can.
        run: see `Tracker.start`.
    """

    def __init__(self, tracker: Tracker, run: RunInfo) -> None:
        self._tracker, self._run = tracker, run
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if tracker.starts_in_thread:
            # a daemon: a run that fails meanwhile does not wait for a server
            self._thread = threading.Thread(target=self._start, name="wmtp-tracker-start", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until the tracker has started.

        Raises:
            WMTPError: it cannot be used.
        """
        with _said_when_slow(self._tracker):
            if self._thread is None:
                self._tracker.start(self._run)
                return
            self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """End the tracker, as of a run that failed early.

        That is before its first step.
        """
        if self._thread is None:
            return
        self._thread.join(_PATIENCE)
        if self._error is None and not self._thread.is_alive():
            try:
                within(self._tracker, lambda: self._tracker.finish("failed", None), patience=_PATIENCE)
            except Exception as error:
                logger.warning("at the end %s", failure(self._tracker, error))

    def _start(self) -> None:
        try:
            self._tracker.start(self._run)
        except BaseException as error:  # raised where the run waits for it
            self._error = error

"""Trackers that a step of training waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from wmtp.tracking.base import Tracker, title
from wmtp.tracking.several import Several

__all__ = ["name_slow"]

logger = logging.getLogger("wmtp")

#: seconds after which the log says what is waited for
_SAID_AFTER: Final = 30.0


def name_slow(tracker: Tracker, waits: Callable[[], tuple[int, float] | None]) -> Callable[[], None]:
    """Watch a tracker, and name it where it holds training.

    It is not left behind: what it was given would be missing in the middle of a curve, and it may come back.

    Args:
        tracker: of the run.
        waits: tells the step that waits for it and since when, by `time.monotonic`; None while none does.

    Returns:
        what ends the watch.
    """
    ended = threading.Event()

    def watch() -> None:
        said: tuple[int, float] | None = None
        while not ended.wait(_SAID_AFTER / 4):
            found = waits()
            if found is None or found == said or time.monotonic() - found[1] < _SAID_AFTER:
                continue
            said = found
            asked = (tracker.asked if isinstance(tracker, Several) else None) or tracker
            logger.warning(
                "step %d: waiting for %s since %g s; training goes on when it answers, and metrics.jsonl has the step",
                found[0], title(asked), time.monotonic() - found[1],
            )  # fmt: skip

    threading.Thread(target=watch, name="wmtp-tracker-watch", daemon=True).start()
    return ended.set

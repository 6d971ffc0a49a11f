"""Requests of a run to its tracker at the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from wmtp.tracking.base import Tracker, title

__all__ = ["AFTER_CTRL_C", "within"]

logger = logging.getLogger("wmtp")

AFTER_CTRL_C: Final = 3.0  #: seconds that a tracker has to close the run

#: seconds after which the log says what is waited for
_SAID_AFTER: Final = 30.0
#: seconds after which a tracker is left behind
_PATIENCE: Final = 600.0
_LEFT: Final[list[Tracker]] = []


def within(tracker: Tracker, call: Callable[[], None], *, patience: float | None = None) -> bool:
    """Call a tracker's method, and leave the tracker behind where that hangs.

    Args:
        tracker: is called in a thread, unless it says that it ends by itself.
        call: calls it.
        patience: seconds that it has, whatever it says. Default: ten minutes, or as long as one that ends by itself takes.

    Returns:
        False where the tracker was left behind, now or before.

    Raises:
        Exception: whatever the method raised.
    """
    if any(left is tracker for left in _LEFT):
        return False
    if tracker.ends_by_itself and patience is None:
        call()
        return True
    errors: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:  # raised where the run waits for it
            errors.append(error)

    limit = _PATIENCE if patience is None else patience
    thread = threading.Thread(target=work, name="wmtp-tracker-end", daemon=True)
    thread.start()
    thread.join(min(_SAID_AFTER, limit))
    if thread.is_alive() and limit > _SAID_AFTER:
        logger.warning("waiting for %s, for %g s at most; Ctrl-C ends the wait", title(tracker), limit)
        thread.join(limit - _SAID_AFTER)
    if thread.is_alive():
        _LEFT.append(tracker)
        logger.warning("%s has not finished in %g s and is left behind; metrics.jsonl has everything", title(tracker), limit)
        return False
    if errors:
        raise errors[0]
    return True

"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wmtp.distributed.ranks import Ranks

__all__ = ["Interrupt", "catch_signals"]

logger = logging.getLogger("wmtp")


class Interrupt:
    """Whether the run was asked to stop.

    Attributes:
        requested: the signal's name, or None.
    """

    requested: str | None = None

    def agreed(self, ranks: Ranks) -> str | None:
        """The signal that any of the processes got; Ctrl-C counts more than SIGTERM."""
        return next((name for name in ("SIGINT", "SIGTERM") if ranks.any(self.requested == name)), None)


@contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """Note the first SIGINT or SIGTERM; the second one acts as if nothing were caught.

    Outside the main thread no signal can be caught, and none is.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        interrupt.requested = signal.Signals(number).name
        logger.warning("%s: saving a checkpoint after this step; once more to stop at once", interrupt.requested)
        for caught, handler in before.items():
            signal.signal(caught, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

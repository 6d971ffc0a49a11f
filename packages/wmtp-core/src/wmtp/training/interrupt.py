"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from wmtp.signals import can_be_caught

if TYPE_CHECKING:
    from wmtp.distributed.ranks import Ranks

__all__ = ["Interrupt", "catch_signals"]

logger = logging.getLogger("wmtp")


class Interrupt:
    """Request to stop the run, if a signal came.

    Attributes:
        requested: the signal's name, or None.
    """

    requested: str | None = None

    def agreed(self, ranks: Ranks) -> str | None:
        """Return the signal that any process got; Ctrl-C goes before SIGTERM."""
        return next((name for name in ("SIGINT", "SIGTERM") if ranks.any(self.requested == name)), None)


@contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """Note the first SIGINT or SIGTERM; leave the second one to others.

    After the first the handlers from before are back. A signal that is ignored stays so, and outside the main thread none can
    be caught.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if can_be_caught(number)}

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

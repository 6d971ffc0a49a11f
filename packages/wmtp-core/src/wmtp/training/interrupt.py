"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from wmtp.signals import can_be_caught

if TYPE_CHECKING:
    from wmtp.distributed.ranks import Ranks

__all__ = ["Interrupt", "catch_signals"]

logger = logging.getLogger("wmtp")

_Handler = Callable[[int, FrameType | None], None]


class Interrupt:
    """Request to stop the run, if a signal came.

    Attributes:
        requested: the signal's name, or None.
    """

    requested: str | None = None

    def __init__(self) -> None:
        self._handlers: dict[int, _Handler] = {}

    def catch(self, number: int, handler: _Handler) -> None:
        """Have ``handler`` called on a signal."""
        signal.signal(number, handler)
        self._handlers[number] = handler

    def release(self) -> None:
        """Expect the handlers to be ours no longer."""
        self._handlers.clear()

    def agreed(self, ranks: Ranks) -> str | None:
        """Return the signal that any process got; Ctrl-C goes before SIGTERM."""
        return next((name for name in ("SIGINT", "SIGTERM") if ranks.any(self.requested == name)), None)

    def warn_of_others(self) -> None:
        """Warn of a handler in the place of ours."""
        if self.requested is not None:  # the handlers from before are back
            return
        for number, handler in list(self._handlers.items()):
            if (other := signal.getsignal(number)) is not handler:
                del self._handlers[number]
                what = getattr(other, "__qualname__", other) if callable(other) else str(other)
                logger.warning(
                    "%s is now handled by %s, which a plugin or library has set: it saves no checkpoint",
                    signal.Signals(number).name, what,
                )  # fmt: skip


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
        interrupt.catch(number, note)
    try:
        yield interrupt
    finally:
        interrupt.release()
        for number, handler in before.items():
            signal.signal(number, handler)

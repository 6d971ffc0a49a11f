"""Signals that end the work."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from wmtp.errors import Terminated

__all__ = ["can_be_caught", "stopped_by_sigterm"]


def can_be_caught(number: int) -> bool:
    """Tell whether a handler may be set for a signal.

    It must be possible to take it back later. Whoever started this process may have had the signal ignored, as ``nohup`` and a
    shell's ``&`` do; and a handler that is not Python's could not be put back. Outside the main thread Python sets none.
    """
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(number) not in (signal.SIG_IGN, None)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end this process as Ctrl-C does.

    What was begun is cleared away. Without this, process 1 of a container does not even hear the signal. A handler of somebody
    else's stays.

    Raises:
        Terminated: it came.
    """
    if not can_be_caught(signal.SIGTERM) or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def end(*_: object) -> None:
        if os.getpid() != process:  # a fork, which has nothing to clear away
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Standard streams that are closed, or whose reader is gone."""

from __future__ import annotations

import os
import select
import sys
from typing import Any

__all__ = ["is_closed", "open_closed_streams"]


def open_closed_streams() -> None:
    """Open closed standard streams (``wmtp … >&-``) on the null device.

    Else a file that got their number would receive what goes to them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def is_closed(stream: Any) -> bool:
    """Tell whether the reader of a stream's pipe is gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # an error is told, whatever is asked for
        return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False

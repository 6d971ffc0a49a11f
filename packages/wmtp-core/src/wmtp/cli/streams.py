"""Standard streams of the shell command: closed ones, and those whose reader is gone."""

from __future__ import annotations

import os
import select
import sys
from typing import Any

__all__ = ["is_closed", "open_closed_streams"]


def open_closed_streams() -> None:
    """Send what goes to a closed standard stream (``wmtp … >&-``) nowhere, and not into a file that got its number."""
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

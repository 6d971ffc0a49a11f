"""Standard streams that are closed, lack characters, or whose reader is gone."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, Final

__all__ = [
    "NOT_WRITTEN",
    "accepts_output",
    "escape_other_characters",
    "has_every_character",
    "is_closed",
    "open_closed_streams",
]

#: numbers of errors by which a write fails where there is no room
NOT_WRITTEN: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


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


def escape_other_characters() -> None:
    """Escape on standard output what its encoding lacks.

    Standard error does so by itself. Else a run would fail at its end, where it prints a completion or the path of a folder: an
    encoding may be ASCII (``PYTHONIOENCODING``, ``LC_ALL``), and a path need not be text in any.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def has_every_character(stream: Any) -> bool:
    """Tell whether a stream's encoding is UTF-8, or it has none."""
    encoding = getattr(stream, "encoding", None)
    return encoding is None or encoding.lower().replace("_", "-") in ("utf-8", "utf8")


def accepts_output(stream: Any) -> bool:
    """Write a line break to a stream, and tell whether it arrives.

    The error of a write does not say which file it was about; to a full disk another write fails too.
    """
    try:
        stream.write("\n")
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def is_closed(stream: Any) -> bool:
    """Tell whether the reader of a stream's pipe is gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # an error is told, whatever is asked for
        return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False

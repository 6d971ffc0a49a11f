"""Progress of a transfer: bars on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from wmtp.sizes import format_bytes

if TYPE_CHECKING:
    from wmtp_storage.listing import Listing
    from wmtp_storage.work import Part

__all__ = ["Progress"]

logger = logging.getLogger("wmtp.storage")

_LINE_INTERVAL = 10.0  # seconds between two lines in a log
_REDRAWN = 0.2  # seconds between two pictures on a terminal
_SHOWN = 6  # files on a terminal at once
_RECENT = 5.0  # seconds that the rate is taken over


class Progress:
    """Shows how far a transfer is.

    Args:
        uri: what is fetched.
        listing: all of it.
        parts: the files that are not whole yet.
    """

    def __init__(self, uri: str, listing: Listing, parts: Sequence[Part]) -> None:
        self._uri, self._parts = uri, parts
        self._total = listing.size
        missing = sum(end - start for part in parts for start, end in part.missing)
        self._done = self._total - missing
        self._files = len(listing.objects)
        self._is_terminal = sys.stderr.isatty()
        self._lines = 0
        self._began = self._shown = time.monotonic()
        self._first = self._done
        self._recent: list[tuple[float, int]] = [(self._began, self._done)]
        if missing < self._total:
            logger.info("%s: %s of %s are here already", uri, format_bytes(self._done), format_bytes(self._total))

    def show(self, count: int) -> None:
        """Count received bytes, and show progress now and then."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= (_REDRAWN if self._is_terminal else _LINE_INTERVAL):
            self._shown = now
            self._recent = [*(point for point in self._recent if now - point[0] <= _RECENT), (now, self._done)]
            if self._is_terminal:
                self._draw()
            else:
                logger.info("%s: %s", self._uri, self._summary())

    def _summary(self) -> str:
        (first, before), now = self._recent[0], time.monotonic()
        rate = (self._done - before) / max(now - first, 1e-3)
        done = min(self._done, self._total)  # what was damaged came twice
        share = 100 * done / self._total if self._total else 100.0
        left = f"{_time((self._total - done) / rate)} left" if rate > 0 else "stalled"
        files = ""
        if self._files > 1:
            whole = self._files - sum(bool(part.missing) for part in self._parts)
            files = f", {whole} of {self._files} files"
        return f"{format_bytes(done)} of {format_bytes(self._total)} ({share:.0f} %), {format_bytes(rate)}/s, {left}{files}"

    def _draw(self) -> None:
        """Paint over what was painted before.

        A line that the terminal breaks in two could not be painted over.
        """
        columns, rows = shutil.get_terminal_size()
        with contextlib.suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(sys.stderr.fileno())
        columns = (columns or 80) - 1
        summary = self._summary()
        lines = [_cut_front(self._uri, columns - len(summary) - 2) + f": {summary}" if columns > len(summary) + 6 else summary]
        bar = 20 if columns >= 60 else 6
        running = (part for part in self._parts if part.is_open and part.stored.size)
        for part in itertools.islice(running, max(0, min(_SHOWN, (rows or 24) - 2))):
            size = part.stored.size
            done = size - sum(end - start for start, end in part.missing)
            begin = f"  {'█' * (bar * done // size):<{bar}} {100 * done // size:3d} %  {format_bytes(size):>9}  "
            lines.append(begin + _cut_front(part.stored.name, columns - len(begin)))
        up = f"\x1b[{self._lines}A" if self._lines else ""
        sys.stderr.write(up + "".join(f"\r\x1b[K{line[:columns]}\n" for line in lines) + "\x1b[J")
        sys.stderr.flush()
        self._lines = len(lines)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._is_terminal and self._lines:
            sys.stderr.write(f"\x1b[{self._lines}A\x1b[J")
            sys.stderr.flush()
        if kind is None:
            seconds = time.monotonic() - self._began
            came = self._done - self._first
            logger.debug("%s: %d files, %s in %s", self._uri, self._files, format_bytes(came), _time(seconds))


def _cut_front(text: str, columns: int) -> str:
    """Shorten a text to its end, and mask unprintable characters.

    The end tells names apart.
    """
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    if sum(map(_width, shown)) <= columns:
        return shown
    end: list[str] = []
    for letter in reversed(shown):
        columns -= _width(letter)
        if columns < 1:
            break
        end.append(letter)
    return "…" + "".join(reversed(end))


def _width(letter: str) -> int:
    return 0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

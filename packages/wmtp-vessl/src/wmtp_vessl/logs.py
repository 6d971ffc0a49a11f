"""Reader of a paged log that yields every line once.

Lines have no numbers. The service knows a line by its time only. Several lines may have the same time and text, a page may be
served twice, a late line may stand before ones already seen, and a page holds no more than it holds. So a stretch of time is
asked for again and again, and of each line (time, source, text) those are new that a page has more of than were seen before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

__all__ = ["LogReader"]

Page = Callable[[float, float | None, int], list[Mapping[str, Any]]]
_Key = tuple[float, str, str]

_INSTANT: Final = 1e-6  #: seconds: whether the end of a stretch belongs to it, services see differently


class LogReader:
    """Goes through a log.

    Args:
        page: the lines from a time to a time (seconds; None: now), up to a maximum. Which of them it gives where
            there are more, the first or the last, does not matter.
        limit: lines a page.
        overlap: seconds before the last line that are looked at again: a line may come so late.
    """

    def __init__(self, page: Page, *, limit: int = 1000, overlap: float = 30.0) -> None:
        self._page = page
        self._limit = limit
        self._overlap = overlap
        self._seen: Counter[_Key] = Counter()
        self._last = 0.0
        self._floor = 0.0
        self._largest = 0

    def new(self) -> list[str]:
        """Return the lines that were not seen before, in order of time."""
        found = self._collect(max(self._floor, self._last - self._overlap))
        fresh: list[str] = []
        for time in sorted(found):
            left = self._seen.copy() if time <= self._last else Counter[_Key]()
            for key in found[time]:
                if left[key] > 0:
                    left[key] -= 1
                else:
                    fresh.append(key[2])
        for keys in found.values():
            self._seen |= Counter(keys)
        self._last = max([self._last, *found])
        horizon = self._last - self._overlap
        self._seen = Counter({key: count for key, count in self._seen.items() if key[0] >= horizon})
        return fresh

    def tail(self, count: int) -> list[str]:
        """Return the last ``count`` lines. Earlier ones are never shown."""
        lines = self._page(0.0, None, max(count, 1))
        if len(lines) >= max(count, 1):
            self._floor = min(_key(line)[0] for line in lines)
        fresh = self.new()
        return fresh[len(fresh) - min(count, len(fresh)) :]

    def _collect(self, start: float) -> dict[float, list[_Key]]:
        """Collect all lines from ``start`` on, by instant.

        Lines of an instant are in the order in which they were served.
        """
        found: dict[float, list[_Key]] = {}
        while True:
            times, may_lack = self._add(start, None, found)
            if not may_lack:
                return found
            self._add_before(start, min(times), found)  # where the service gave the last lines
            if max(times) <= start:
                return found
            start = max(times)  # where it gave the first ones

    def _add_before(self, start: float, end: float, found: dict[float, list[_Key]]) -> None:
        while True:  # down to the first instant, of which a page may have had a part
            times, may_lack = self._add(start, end + _INSTANT, found)
            if not may_lack or min(times) >= end:
                return
            end = min(times)

    def _add(self, start: float, end: float | None, found: dict[float, list[_Key]]) -> tuple[list[float], bool]:
        """Add a page to what was found.

        Returns the times in it, and whether there may be more lines than it holds. A service may hold less in a page than it
        was asked for. A page that is smaller than another one was is whole.
        """
        limit, size = self._limit, -1
        while True:
            keys = [_key(line) for line in self._page(start, end, limit)]
            times = [key[0] for key in keys]
            may_lack = len(keys) >= max(1, min(limit, self._largest))
            self._largest = max(self._largest, len(keys))
            if not may_lack or min(times) != max(times) or len(keys) == size:
                break
            limit, size = limit * 4, len(keys)  # full of one instant: that may have more lines
        for time in dict.fromkeys(times):
            found[time] = _united([key for key in keys if key[0] == time], found.get(time, []))
        return times, may_lack

    def follow(self, pause: Callable[[], None], is_over: Callable[[], bool]) -> Iterator[str]:
        """Yield new lines until the run is over and nothing comes.

        Args:
            pause: waits until it is worth asking again.
            is_over: whether the run has ended.
        """
        quiet = 0
        while quiet < 2:
            over = is_over()  # asked first, so that lines between the two requests are not lost
            lines = self.new()
            yield from lines
            quiet = quiet + 1 if over and not lines else 0
            if quiet < 2:
                pause()


def _united(one: list[_Key], other: list[_Key]) -> list[_Key]:
    """Unite two views of one instant.

    The longer one, and what only the shorter has.
    """
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    return [*longer, *(Counter(shorter) - Counter(longer)).elements()]


def _key(line: Mapping[str, Any]) -> _Key:
    time = line.get("timestamp")
    source = "/".join(str(line.get(key, "")) for key in ("entity", "source", "stream", "type"))
    return (float(time) if isinstance(time, int | float) else 0.0, source, str(line.get("message", "")).rstrip("\r\n"))

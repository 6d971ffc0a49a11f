"""Control of the number of parallel requests.

More while it speeds the transfer, fewer on overload.
"""

from __future__ import annotations

import time

__all__ = ["Throttle"]

_FIRST = 8
#: small objects are all latency: one more request at the beginning for so many objects
_OBJECTS = 8
_INTERVAL = 0.25  # seconds between two decisions
_GAIN = 1.2  # more requests must bring so much more throughput
_PATIENCE = 16  # decisions without gain until more requests are tried again
#: a request costs about as much as so many bytes: what small objects gain from more requests is counted, too
_REQUEST = 2**17


class Throttle:
    """Limit of parallel requests, doubled while that pays.

    It is halved when the store asks for less. It belongs to one event loop.

    Args:
        most: never more requests than this.
        objects: how many there are to fetch.
    """

    def __init__(self, most: int, objects: int = 1) -> None:
        self.limit = min(max(_FIRST, objects // _OBJECTS), most)
        self._most = most
        self._settled = self.limit
        self._best = 0.0
        self._waited = 0
        self._amount = self._bytes = 0
        self.rate = 0.0
        self._since = time.monotonic()
        self._slowed = 0.0

    def count(self, amount: int, *, is_request: bool = False) -> None:
        """Count bytes that came in, and the request that began with them."""
        self._bytes += amount
        self._amount += amount + (_REQUEST if is_request else 0)

    def decide(self) -> None:
        """Look at the throughput now and then, and change the limit."""
        now = time.monotonic()
        if now - self._since < _INTERVAL:
            return
        rate = self._amount / (now - self._since)
        self.rate = self._bytes / (now - self._since)  # bytes a second, of all requests
        self._amount, self._bytes, self._since = 0, 0, now
        self._waited += 1
        if rate > self._best * _GAIN or self._waited >= _PATIENCE:
            self._best, self._waited, self._settled = rate, 0, self.limit
            self.limit = min(self._most, self.limit * 2)
        else:
            self.limit = self._settled

    def slow_down(self) -> None:
        """Halve the limit: the store is overloaded.

        Several such answers at once count as one.
        """
        now = time.monotonic()
        if now - self._slowed > _INTERVAL:
            self._slowed = now
            self.limit = self._settled = max(1, self.limit // 2)
            self._best, self._waited = float("inf"), 0

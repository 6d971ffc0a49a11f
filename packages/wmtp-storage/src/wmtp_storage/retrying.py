"""Retries of failed requests, for a time in place of a number."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import BotoCoreError, ConnectionError, HTTPClientError, SSLError
from obstore.exceptions import BaseError

from wmtp_storage.failures import understand

__all__ = ["FIRST_PAUSE", "LONGEST_PAUSE", "Retries", "is_transient", "with_retries"]

logger = logging.getLogger("wmtp.storage")

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between two tries
_SAYS_SO_AFTER = 3.0  # seconds of failures that are not reported
_Result = TypeVar("_Result")


class Retries:
    """Says whether a request that failed is sent again, and when.

    Args:
        limit: seconds since the last success after which it is given up.
        what: the request is about, for the line that says that it is tried again.
    """

    def __init__(self, limit: float, what: object) -> None:
        self._limit, self._what = limit, what
        self._said = False
        self.renew()

    def renew(self) -> None:
        """Restart the time: bytes have come."""
        self.failures = 0
        self._since = time.monotonic()

    @property
    def waited(self) -> float:
        """Seconds since the last success."""
        return time.monotonic() - self._since

    def pause(self, error: BaseException) -> float | None:
        """Return the seconds until the next try; None when time is over.

        The last try is at its very end.
        """
        self.failures += 1
        left = self._limit - self.waited
        if left <= 0:
            return None
        if self.waited > _SAYS_SO_AFTER and not self._said:
            self._said = True
            reason = understand(error).message or type(error).__name__
            logger.warning("%s: %s; trying again for up to %.0f s", self._what, reason, self._limit)
        return min(left, random.uniform(0.1, 1) * min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self.failures - 1, 10)))


def is_transient(error: BaseException) -> bool:
    """Tell whether the same request may succeed when it is sent again."""
    if isinstance(error, BotoCoreError):
        return isinstance(error, HTTPClientError | ConnectionError) and not isinstance(error, SSLError)
    return isinstance(error, BaseError) and understand(error).is_transient


def with_retries(limit: float, what: object, attempt: Callable[[], _Result]) -> _Result:
    """Send a request, and again where it fails on its way.

    Its answer is read within ``attempt``, so that one that breaks off is asked for once more.

    Args:
        limit: seconds after which it is given up.
        what: it is about.
        attempt: sends it; twice must be as good as once.
    """
    retries = Retries(limit, what)
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_transient(error) or (pause := retries.pause(error)) is None:
                raise
        time.sleep(pause)

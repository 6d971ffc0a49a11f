"""Background sender of metrics: training never waits for a server."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final, Generic, TypeVar

__all__ = ["Sender"]

logger = logging.getLogger("wmtp")
Item = TypeVar("Item")

_FIRST_DELAY: Final = 1.0
_LAST_DELAY: Final = 60.0


class Sender(Generic[Item]):
    """A queue, and the thread that empties it in order.

    While the receiver is away everything is kept. The log says once that the receiver is away, and once that it is back.

    Args:
        send: sends some items; called by the thread only. It raises where they did not arrive.
        refused: whether an error of ``send`` means that the same items will never be taken. They are dropped then, and the
            log says so, once.
        reason: one line that says what an error is.
        receiver: what messages call the receiver.
        batch: how many items are sent at once at most.
        interval: seconds to wait for more items before a send.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Item]], None],
        *,
        refused: Callable[[Exception], bool],
        reason: Callable[[Exception], str],
        receiver: str,
        batch: int,
        interval: float = 1.0,
    ) -> None:
        self._send = send
        self._refused = refused
        self._reason = reason
        self._receiver = receiver
        self._batch = batch
        self._interval = interval
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._last_progress = time.monotonic()
        self._away = False
        self._said_refused = False
        # a daemon: an interpreter that ends without `close` must not hang on a server that is away
        self._thread = threading.Thread(target=self._work, name="wmtp-tracker", daemon=True)
        self._thread.start()

    def put(self, items: Iterable[Item]) -> None:
        """Queue items; returns at once."""
        with self._changed:
            self._items.extend(items)
            self._changed.notify_all()

    def close(self, patience: float) -> int:
        """Send what is left, and stop.

        Args:
            patience: seconds without any progress after which the rest is given up.

        Returns:
            how many items were not sent.
        """
        self._last_progress = time.monotonic()
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(0.05)
            if time.monotonic() - self._last_progress > patience:
                self._given_up.set()
                break
        return len(self._items)

    def _work(self) -> None:
        while batch := self._next():
            if not self._deliver(batch):
                return
            with self._changed:
                for _ in batch:
                    self._items.popleft()
            self._last_progress = time.monotonic()

    def _next(self) -> list[Item]:
        """Return the oldest items; none once closed and empty.

        They stay queued until sent.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closing.is_set())
            self._changed.wait_for(lambda: len(self._items) >= self._batch or self._closing.is_set(), timeout=self._interval)
            return list(islice(self._items, self._batch))

    def _deliver(self, batch: list[Item]) -> bool:
        """Send ``batch``, however often it takes; False if it was given up."""
        delay = _FIRST_DELAY
        while not self._given_up.is_set():
            try:
                self._send(batch)
            except Exception as error:
                if self._refused(error):
                    self._say_refused(error)
                    return True
                self._say_away(error)
                if self._closing.is_set():
                    self._given_up.wait(_FIRST_DELAY / 2)
                else:
                    self._closing.wait(delay)
                delay = min(2 * delay, _LAST_DELAY)
            else:
                if self._away:
                    self._away = False
                    logger.warning("%s is back; what it missed is being sent", self._receiver)
                return True
        return False

    def _say_away(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            message = (
                "%s is away: %s; training continues, metrics.jsonl has everything, and what it misses is sent when it is back"
            )
            logger.warning(message, self._receiver, self._reason(error))

    def _say_refused(self, error: Exception) -> None:
        if not self._said_refused:
            self._said_refused = True
            message = "%s refuses metrics: %s; training continues, and metrics.jsonl has everything"
            logger.warning(message, self._receiver, self._reason(error))

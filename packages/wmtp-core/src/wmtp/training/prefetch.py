"""Batches made ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wmtp.data.batch import Batch

__all__ = ["Prefetcher"]


class Prefetcher:
    """Makes the next batches in a thread of its own while a step computes.

    Which batch a step gets is decided as without it. What goes wrong with a batch is raised where that batch is asked for, and
    not before.

    Args:
        make: makes the batch of an optimizer step, from 0; called by one thread only.
        stop: the step after the last one.
        pin: put them into page-locked memory, from which a copy to a GPU does not wait.
        depth: how many batches are made ahead.
    """

    def __init__(self, make: Callable[[int], Batch], stop: int, *, pin: bool, depth: int = 2) -> None:
        self._make_batch = make
        self._stop = stop
        self._pin = pin
        self._depth = depth
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wmtp-batches")

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step ``step``; at once where the step before it was asked for last."""
        if not self._ahead or self._ahead[0][0] != step:
            self.forget()
            self._ahead.append((step, self._thread.submit(self._make, step)))
        while len(self._ahead) <= self._depth and (following := self._ahead[-1][0] + 1) < self._stop:
            self._ahead.append((following, self._thread.submit(self._make, following)))
        return self._ahead.popleft()[1].result()

    def close(self) -> None:
        """Stop making batches."""
        self.forget()
        self._thread.shutdown()

    def forget(self) -> None:
        """Make the batches that are ready, and those that are being made, again when they are asked for."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _make(self, step: int) -> Batch:
        batch = self._make_batch(step)
        return batch.pinned() if self._pin else batch

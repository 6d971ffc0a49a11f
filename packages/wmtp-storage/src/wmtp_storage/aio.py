"""Asynchronous work from synchronous code, bounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, suppress
from typing import Any

__all__ = ["Budget", "run", "together"]

_GLANCE = 0.5  # seconds between two looks for Ctrl-C


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, in a thread of its own.

    The caller's thread may have a running event loop, as in a notebook. Ctrl-C cancels the coroutine; what it does in its
    ``finally`` blocks is waited for.
    """
    worker = _Worker(work)
    try:
        # Python misses a Ctrl-C that comes in the moment in which a wait begins: it is seen at its end
        while not wait([worker.done], timeout=_GLANCE).done:
            pass
        worker.done.result()
    finally:
        worker.cancel()
        worker.thread.join()


class _Worker:
    """A coroutine in a thread of its own."""

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self._work = work
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        self.done: Future[None] = Future()
        self.thread = threading.Thread(target=self._run, name="wmtp-storage", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.done.set_result(asyncio.run(self._main()))
        except BaseException as error:
            self.done.set_exception(error)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.ensure_future(self._work)
        if self._cancelled:
            self._task.cancel()
        await self._task

    def cancel(self) -> None:
        """Have it end soon; nothing if it has ended."""
        self._cancelled = True
        if self._task is not None and not self._task.done():
            with suppress(RuntimeError):  # the loop was closed just now
                self._loop.call_soon_threadsafe(self._task.cancel)


async def together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines side by side; the first failure stops the others.

    What it raised is raised.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Budget:
    """So much of something (bytes, connections) that several share.

    Args:
        total: how much there is.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def share(self, amount: int) -> AsyncIterator[None]:
        """Wait until ``amount`` is free, and hold it.

        Who wants more than there is gets all of it.
        """
        amount = min(amount, self.total)
        async with self._changed:
            await self._changed.wait_for(lambda: self.free >= amount)
            self.free -= amount
        try:
            yield
        finally:
            async with self._changed:
                self.free += amount
                self._changed.notify_all()

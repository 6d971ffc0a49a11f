"""Asynchronous work from synchronous code, bounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

__all__ = ["Budget", "run", "together"]

_T = TypeVar("_T")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, in a thread of its own: the caller's may have a loop already, as in a notebook.

    Ctrl-C cancels it; what it does in its ``finally`` blocks is waited for.
    """
    done: Future[_T] = Future()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[_T]]] = Future()

    async def main() -> _T:
        task = asyncio.ensure_future(work)
        started.set_result((asyncio.get_running_loop(), task))
        return await task

    def thread() -> None:
        try:
            done.set_result(asyncio.run(main()))
        except BaseException as error:
            done.set_exception(error)

    worker = threading.Thread(target=thread, name="wmtp-storage", daemon=True)
    worker.start()
    try:
        return done.result()
    except BaseException:  # of the work, or Ctrl-C here
        loop, task = started.result()
        if worker.is_alive() and not task.done():
            loop.call_soon_threadsafe(task.cancel)
        worker.join()
        raise


async def together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines side by side. The first that fails stops the others, and what it raised is raised."""
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
        """Wait until ``amount`` is free, and hold it; who wants more than there is gets all of it."""
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

"""Watcher that names dead or hanging ranks and ends stuck processes.

Every rank writes a beat to the store of the run, from a thread of its own: a rank whose beats stop is gone (or its machine is,
or it was stopped); one that beats but does fewer steps than the others hangs. Where a collective fails, or a rank has done
nothing for the time allowed, the beats say which rank is to blame. This thread works where the main one cannot: while it waits
in NCCL no Python runs in it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from attrs import frozen

from wmtp.errors import WMTPError

__all__ = ["LostRankError", "Monitor"]

_BEAT = 0.5  # seconds
#: a collective has its own time limit, and raises first where it can
_GRACE = 5.0

logger = logging.getLogger("wmtp")


class LostRankError(WMTPError):
    """Another rank is gone or hangs; the message names it."""


@frozen(kw_only=True)
class _Beat:
    """Heartbeat of a rank.

    Args:
        number: of the beat.
        steps: how often something was done.
        done: what was done last.
        who: host and process.
    """

    number: int
    steps: int
    done: str
    who: str


class Monitor:
    """Sender of this rank's heartbeats, and watcher of the others'.

    Args:
        rank: this one.
        world_size: how many there are.
        timeout: seconds without progress after which this process is ended.
    """

    def __init__(self, *, rank: int, world_size: int, timeout: float) -> None:
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
        )
        self._who = f"{socket.gethostname()}, process {os.getpid()}"
        self._number, self._steps, self._done = 0, 0, "start"
        self._since: float | None = None
        self._stopped = threading.Event()
        #: called with the message before this process is ended
        self.report: Callable[[str], None] = lambda message: logger.error("%s", message)
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="wmtp-monitor", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """True while the timeout is counting."""
        return self._since is not None

    def tick(self, done: str) -> None:
        """Record progress, and restart the timeout."""
        self._steps += 1
        self._done = done
        self._since = time.monotonic()

    def pause(self) -> None:
        """Stop the timeout: the next operation may take any time."""
        self._since = None

    def stop(self) -> None:
        """No more beats, and no more watching."""
        self._stopped.set()
        self._thread.join()

    def explain(self) -> str | None:
        """Name the ranks that are gone or hang, if any.

        Takes about two seconds.
        """
        try:
            before = self._beats()
            time.sleep(4 * _BEAT)
            after = self._beats()
        except RuntimeError:
            return "rank 0, or the process that started it, is gone: nothing answers any more"
        silent = [rank for rank, beat in after.items() if beat is None or beat == before[rank]]
        silent = [rank for rank in silent if rank != self._rank]
        if silent:
            return f"{_names(silent, after)} is gone: no sign of life {self._where(after)}"
        heard = {rank: beat for rank, beat in after.items() if beat is not None}
        last = min(beat.steps for beat in heard.values())
        behind = [rank for rank, beat in heard.items() if beat.steps == last]
        if len(behind) < len(heard):
            return f"{_names(behind, after)} hangs {self._where(after)}"
        return None

    def _where(self, beats: dict[int, _Beat | None]) -> str:
        own = beats[self._rank]
        return f"after {own.done if own is not None else self._done}"

    def _beat(self) -> None:
        self._number += 1
        self._store.set(f"wmtp/beat/{self._rank}", json.dumps([self._number, self._steps, self._done, self._who]))

    def _beats(self) -> dict[int, _Beat | None]:
        found: dict[int, _Beat | None] = {}
        for rank in range(self._world_size):
            key = f"wmtp/beat/{rank}"
            if not self._store.check([key]):
                found[rank] = None
                continue
            number, steps, done, who = json.loads(self._store.get(key))
            found[rank] = _Beat(number=number, steps=steps, done=done, who=who)
        return found

    def _watch(self) -> None:
        while not self._stopped.wait(_BEAT):
            late = self._since is not None and time.monotonic() - self._since > self._timeout + _GRACE
            try:
                self._beat()
            except RuntimeError:
                if not late:
                    continue
            if late:
                self._end()

    def _end(self) -> None:
        lost = threading.Thread(target=self._say, daemon=True)
        lost.start()
        while lost.is_alive():  # others look for this rank's beats meanwhile
            try:
                self._beat()
            except RuntimeError:
                break
            lost.join(_BEAT)
        lost.join(10)
        os._exit(1)

    def _say(self) -> None:
        explained = self.explain() or "no rank makes progress, and all are alive: a collective hangs"
        self.report(f"{explained} (devices.timeout = {self._timeout:g} s)")


def _names(ranks: list[int], beats: dict[int, _Beat | None]) -> str:
    return " and ".join(
        f"rank {rank} ({beat.who if (beat := beats[rank]) is not None else 'never heard of'})" for rank in ranks
    )

"""Transfer of objects into files, by ranges side by side.

They are written where they belong, and verified at the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import obstore
from awscrt.checksums import crc64nvme
from obstore.exceptions import NotFoundError, PreconditionError

from wmtp.errors import WMTPError
from wmtp_storage.aio import run
from wmtp_storage.checksums import etag_md5
from wmtp_storage.failures import explained, understand
from wmtp_storage.journal import Journal, Segment
from wmtp_storage.retrying import Retries
from wmtp_storage.throttle import Throttle
from wmtp_storage.verification import Verification
from wmtp_storage.work import Part, Range, Work

if TYPE_CHECKING:
    from wmtp_storage.backend import ObjectStorage
    from wmtp_storage.uris import RemoteURI

__all__ = ["Changed", "Transfer"]

logger = logging.getLogger("wmtp.storage")

_PIECE = 2**20  # bytes written at once, at most
_SMALLEST_PIECE = 2**16
_FIRST_PIECE = 2**18
_MOMENT = 1 / 128  # seconds between two pieces of a connection
#: what a connection holds beside the piece that is being written: the next one, and what the client has read ahead
_HELD = 4
_NOTED = 2**20  # bytes of a range between two notes in the journal: a kill loses less of each connection
_TICK = 0.1  # seconds between two looks at how it goes


class Changed(Exception):
    """An object is no longer what it was when it was listed."""


class _Broken(Exception):
    """Answer of a server that does not fit the request."""


class Transfer:
    """Fetches files.

    Args:
        storage: the backend.
        uri: the folder or file that the objects are of.
        parts: the files, with what they have already.
        journal: where what was written is noted.
        progress: called now and then with the bytes that came in since the last call.
    """

    def __init__(
        self,
        storage: ObjectStorage,
        uri: RemoteURI,
        parts: Iterable[Part],
        journal: Journal,
        progress: Callable[[int], None],
    ) -> None:
        config = storage.config
        self._uri = uri
        self._opened = storage.opened(uri)
        self._config = config
        self._parts = list(parts)
        self._journal = journal
        self._progress = progress
        self._work = Work((part for part in self._parts if part.missing), int(config.chunk_size * 2**20) or 1)
        most = min(config.max_connections, config.max_memory * 2**20 // (_HELD * _SMALLEST_PIECE))
        self._throttle = Throttle(most, len(self._parts))
        self._verification = Verification(self._opened, uri, self._parts, journal, self._work.add)
        self._unreported = 0
        self.received = 0

    def run(self) -> None:
        """Fetch and verify all files.

        Raises:
            Changed: an object is no longer the one that was listed.
            WMTPError: a file could not be read, written, or is not what the store says that it is.
        """
        try:
            self._verification.start()
            run(self._manage())
        finally:
            self._verification.stop()
            for part in self._parts:
                part.close()
            self._report()

    async def _manage(self) -> None:
        """Keep as many workers busy as the throttle allows."""
        workers: set[asyncio.Task[None]] = set()
        try:
            while not self._verification.is_done():
                while len(workers) < self._throttle.limit and (running := self._work.take(self._throttle.limit)) is not None:
                    workers.add(asyncio.create_task(self._worker(running)))
                if not workers:
                    await asyncio.sleep(_TICK / 5)
                    continue
                ended, workers = await asyncio.wait(workers, timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
                # every one is asked: asyncio prints a traceback of an error that nobody takes
                errors = [error for worker in ended if (error := worker.exception()) is not None]
                if errors:
                    raise next((error for error in errors if isinstance(error, Changed)), errors[0])
                self._throttle.decide()
                self._report()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _report(self) -> None:
        count, self._unreported = self._unreported, 0
        self._progress(count)

    async def _worker(self, running: Range | None) -> None:
        """Fetch one range after the other, while the throttle allows it."""
        while running is not None:
            begin = running.position
            await self._fetch(running)
            part = running.part
            if self._work.done(running):
                self._verification.whole(part)
            else:
                self._verification.came(part, begin, running.end)
            if self._work.active >= self._throttle.limit:
                return
            running = self._work.take(self._throttle.limit)

    async def _fetch(self, running: Range) -> None:
        """Fetch a range, continuing where it broke off.

        A try that brought bytes resets the count of failures.
        """
        name = self._uri.at(running.part.stored.name) if running.part.stored.key != self._uri.key else self._uri
        retries = Retries(self._config.retry_timeout, name)
        while running.position < running.end:
            before = running.position
            try:
                await self._read(running)
                continue
            except (PreconditionError, NotFoundError, FileNotFoundError) as error:
                raise Changed(running.part.stored.name) from error
            except (obstore.exceptions.BaseError, _Broken) as caught:
                error: Exception = caught
            if running.position > before and running.part.has_ranges:
                retries.renew()
            failure = understand(error)
            if failure.status == 416:  # it is shorter than it was
                raise Changed(running.part.stored.name) from error
            if not (failure.is_transient or isinstance(error, _Broken)):
                raise explained(error, name) from error
            if failure.status in (429, 503):
                self._throttle.slow_down()
            if (pause := retries.pause(error)) is None:
                reason = str(error) if isinstance(error, _Broken) else str(explained(error, name)).partition(": ")[2]
                tries = f"{retries.failures} tries in {retries.waited:.0f} s"
                raise WMTPError(
                    f"{name} could not be read: {reason}; given up after {tries}. What came is kept: run it again to continue"
                ) from error
            logger.debug("%s at byte %d: %s; trying again", name, running.position, failure.message or error)
            await asyncio.sleep(pause)

    async def _read(self, running: Range) -> None:
        """Send one request, and write what comes."""
        part, stored = running.part, running.part.stored
        begin, end = running.position, running.end
        is_whole = begin == 0 and end == stored.size
        options: dict[str, Any] = {} if is_whole else {"range": (begin, end)}
        if stored.etag is not None and not stored.etag.startswith("W/"):  # a weak one never matches
            options["if_match"] = stored.etag
        self._throttle.count(0, is_request=True)
        answer = await obstore.get_async(self._opened.store, stored.key, options=options)  # type: ignore[arg-type]
        if stored.differs_from(answer.meta):
            raise Changed(stored.name)
        if answer.range != (begin, end):
            raise _Broken(f"the server sent bytes {answer.range[0]} to {answer.range[1]} in place of {begin} to {end}")
        md5 = hashlib.md5(usedforsecurity=False) if is_whole and etag_md5(stored.etag) is not None else None
        noted = written = begin
        crc = 0

        def note() -> None:
            """Have a kill from now on lose nothing of what is written."""
            nonlocal noted, crc
            if written > noted:
                segment = Segment(noted, written, crc)
                part.segments.append(segment)
                self._journal.add(stored.name, segment)
                noted, crc = written, 0

        try:
            async for piece in answer.stream(min_chunk_size=self._piece()):
                view = memoryview(piece)
                start, count = self._work.reserve(running, len(view))
                if count < len(view) and running.end == end:
                    raise _Broken("the server sent more bytes than it was asked for")
                view = view[:count]
                self._write(part, view, start)
                crc, written = crc64nvme(view, crc), written + count  # type: ignore[arg-type]
                if part.has_ranges and written - noted >= _NOTED:
                    note()
                if md5 is not None:
                    md5.update(view)
                self.received += count
                self._unreported += count
                self._throttle.count(count)
                if running.position >= running.end:
                    break
        finally:
            if part.has_ranges or written == stored.size:
                note()
            elif written > begin:
                self._work.restart(running)
        if running.position < running.end:
            raise _Broken("the server sent fewer bytes than it was asked for")
        if md5 is not None and written == stored.size:
            part.md5 = md5.hexdigest()

    def _piece(self) -> int:
        """Return the bytes to write at once.

        What a connection brings in a moment, as far as the memory for all of them allows it.
        """
        room = self._config.max_memory * 2**20 // (_HELD * self._throttle.limit)
        wanted = int(self._throttle.rate / self._throttle.limit * _MOMENT) if self._throttle.rate else _FIRST_PIECE
        return max(_SMALLEST_PIECE, min(_PIECE, wanted, room))

    def _write(self, part: Part, view: memoryview, position: int) -> None:
        try:
            part.write(view, position)
        except OSError as error:
            raise WMTPError(
                f"{part.path} could not be written: {error.strerror or error}. What came is kept: make room, and run it again"
                " to continue"
            ) from error

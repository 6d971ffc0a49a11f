"""Byte ranges to fetch, shared by workers in several threads."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field

from wmtp_storage.journal import Segment

if TYPE_CHECKING:
    from wmtp_storage.backend import StoredObject

__all__ = ["Part", "Range", "Work"]

#: a connection is worth opening for so many bytes
_SMALLEST = 4 * 2**20
#: a range that will take this long (seconds) is shared with a worker that has nothing to do
_TOO_SLOW = 1.0
#: smaller files are not allocated beforehand
_ALLOCATED = 2**20
_SYNC_FILE_RANGE_WRITE = 2


def _write_back(descriptor: int, start: int, count: int) -> None:
    """Have Linux begin to write a stretch of a file back.

    It waits for nothing. On other systems nothing is done.
    """
    if (begin := _sync_file_range()) is not None:
        begin(descriptor, start, count, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    import ctypes

    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


@define(eq=False)
class Part:
    """A file on its way.

    Args:
        stored: the object that it is of.
        path: where it is until all files are whole.
        segments: what is written.
        has_ranges: whether the server gives parts of the object; else it comes from its beginning to its end.
        attempts: how often it was found damaged.
        md5: of the content, where it came as a whole.
        hash: CRC-64/NVME of the content, once it is whole and verified.
        checked: the store's checksum that it was compared with.
    """

    stored: StoredObject
    path: Path
    segments: list[Segment] = field(factory=list)
    has_ranges: bool = True
    attempts: int = 0
    md5: str | None = None
    hash: int | None = None
    checked: str | None = None
    _descriptor: int | None = None
    _lock: threading.Lock = field(factory=threading.Lock)

    @property
    def missing(self) -> list[tuple[int, int]]:
        """List the gaps between the segments."""
        gaps, position = [], 0
        for segment in sorted(self.segments, key=lambda segment: segment.start):
            if segment.start > position:
                gaps.append((position, segment.start))
            position = segment.end
        return gaps if position == self.stored.size else [*gaps, (position, self.stored.size)]

    @property
    def is_open(self) -> bool:
        """Return True if the file is open for writing."""
        return self._descriptor is not None

    @property
    def is_flushed(self) -> bool:
        """Return True for a preallocated file, which must be flushed.

        Its size alone proves nothing. After a loss of power it would have its size, and not its content.
        """
        return self.stored.size >= _ALLOCATED

    def write(self, piece: memoryview, position: int) -> None:
        """Write bytes where they belong.

        Raises:
            OSError: the disk is full, or fails.
        """
        if self._descriptor is None:
            self.open()
        assert self._descriptor is not None, "open() has opened it"
        while piece:
            count = os.pwrite(self._descriptor, piece, position)
            piece, position = piece[count:], position + count

    def open(self) -> None:
        """Open the file, and allocate its place on the disk.

        Pieces that arrive out of order would scatter it.
        """
        with self._lock:
            if self._descriptor is not None:
                return
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(descriptor).st_size != self.stored.size:
                    os.ftruncate(descriptor, self.stored.size)
                    if self.is_flushed and hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(descriptor, 0, self.stored.size)
            except OSError:
                os.close(descriptor)
                raise
            self._descriptor = descriptor

    def begin_flush(self, start: int, end: int) -> None:
        """Begin to write a stretch of the file to the disk.

        So `flush` has little left to wait for.
        """
        with self._lock:
            if self._descriptor is not None:
                _write_back(self._descriptor, start, end - start)

    def flush(self) -> None:
        """Wait until a preallocated file is on the disk."""
        if self.is_flushed:
            self.open()
            assert self._descriptor is not None, "open() has opened it"
            os.fsync(self._descriptor)
            self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


@define(eq=False)
class Range:
    """Bytes that a worker is fetching.

    Args:
        part: of which file.
        position: the next byte.
        end: the byte after the last; it moves when another worker takes over the rest.
        began: when, and at which byte.
    """

    part: Part
    position: int
    end: int
    began: tuple[float, int]


class Work:
    """Hands out ranges.

    Args:
        parts: the files; small ones go first, ranges of one file in their order.
        chunk: bytes of a range, at most.
    """

    def __init__(self, parts: Iterable[Part], chunk: int) -> None:
        self._largest = chunk
        self._smallest = min(_SMALLEST, chunk)
        self._lock = threading.Lock()
        self._running: set[Range] = set()
        self._gaps: deque[tuple[Part, int, int]] = deque()
        self._open: Counter[Part] = Counter()  # gaps and running ranges of each file
        self.left = 0
        for part in sorted(parts, key=lambda part: part.stored.size):
            self.add(part)

    def add(self, part: Part) -> None:
        """Have what is missing of a file fetched."""
        with self._lock:
            gaps = part.missing if part.has_ranges else [(0, part.stored.size)]
            self._gaps.extend((part, start, end) for start, end in gaps)
            self._open[part] += len(gaps)
            self.left += sum(end - start for start, end in gaps)

    @property
    def active(self) -> int:
        """Number of ranges being fetched."""
        return len(self._running)

    def take(self, workers: int) -> Range | None:
        """Take a range to fetch; None where nothing is left to begin.

        Args:
            workers: how many there are: towards the end ranges become smaller, so that all end together.
        """
        with self._lock:
            if self._gaps:
                part, start, end = self._gaps.popleft()
                size = min(self._largest, max(self._smallest, self.left // (2 * workers)))
                if part.has_ranges and end - start > size + self._smallest // 4:
                    self._gaps.appendleft((part, start + size, end))
                    self._open[part] += 1
                    end = start + size
            elif (slow := self._slow()) is not None:
                part, end = slow.part, slow.end
                self._open[part] += 1
                start = slow.end = slow.position + (slow.end - slow.position) // 2
            else:
                return None
            taken = Range(part, start, end, (time.monotonic(), start))
            self._running.add(taken)
            return taken

    def _slow(self) -> Range | None:
        """Find the range that would take the longest, if that is long."""
        now = time.monotonic()

        def seconds_left(running: Range) -> float:
            when, where = running.began
            return (running.end - running.position) * (now - when) / max(1, running.position - where)

        shared = [each for each in self._running if each.part.has_ranges and each.end - each.position >= 2 * self._smallest]
        slowest = max(shared, key=seconds_left, default=None)
        return slowest if slowest is not None and seconds_left(slowest) > _TOO_SLOW else None

    def reserve(self, running: Range, count: int) -> tuple[int, int]:
        """Claim the next bytes of a range for writing.

        Returns where they begin, and how many of ``count`` are the worker's.
        """
        with self._lock:
            start = running.position
            count = min(count, running.end - start)
            running.position += count
            self.left -= count
            return start, count

    def restart(self, running: Range) -> None:
        """Go back to the first byte: the server gives no ranges."""
        with self._lock:
            self.left += running.position
            running.position = 0

    def done(self, running: Range) -> bool:
        """End a range, and tell whether its file has no other left."""
        with self._lock:
            self._running.discard(running)
            self._open[running.part] -= 1
            return not self._open[running.part]

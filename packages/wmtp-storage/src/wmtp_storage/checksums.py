"""Compares a file with the checksum that its store has of it."""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from attrs import frozen
from awscrt.checksums import crc32c, crc64nvme

__all__ = ["PartDigests", "StoreChecksum", "etag_md5", "from_headers"]

_BLOCK = 2**18  # bytes read at once
_MD5: Final = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')


class _CRC:
    """A CRC with the interface of `hashlib`."""

    def __init__(self, function: Callable[[Any, int], int], size: int) -> None:
        self._function, self._size, self._value = function, size, 0

    def update(self, data: Any) -> None:
        """Add bytes."""
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        """Return the checksum, big-endian."""
        return self._value.to_bytes(self._size, "big")


#: the cheapest to compute first
_ALGORITHMS: Final[Mapping[str, Callable[[], Any]]] = {
    "crc64nvme": lambda: _CRC(crc64nvme, 8),
    "crc32c": lambda: _CRC(crc32c, 4),
    "crc32": lambda: _CRC(zlib.crc32, 4),
    "sha1": hashlib.sha1,
    "sha256": hashlib.sha256,
    "md5": hashlib.md5,
}


@frozen
class StoreChecksum:
    """Checksum of an object, as its store reports it.

    Args:
        algorithm: ``crc64nvme``, ``crc32c``, ``crc32``, ``sha1``, ``sha256`` or ``md5``.
        value: the checksum, of the content or, where there are parts, of the checksums of its parts.
        part_sizes: bytes of each part; None for a checksum of the content itself.
    """

    algorithm: str
    value: bytes
    part_sizes: Sequence[int] | None = None

    def __str__(self) -> str:
        return self.algorithm if self.part_sizes is None else f"{self.algorithm} of parts"

    def matches(self, path: Path, is_stopped: Callable[[], bool] = lambda: False) -> bool:
        """Compare a file with a checksum without parts.

        Ends early where ``is_stopped``; that answer is of no use.
        """
        return _digest(self.algorithm, path, 0, path.stat().st_size, is_stopped) == self.value


class PartDigests:
    """Checksums of an object's parts, computed while the rest is fetched.

    Each is started once its bytes are on disk.

    Args:
        checksum: of the parts' checksums.
        path: the file.
        pool: where they are computed: as many at once as there are threads.
        is_stopped: whether the result is no longer wanted.
    """

    def __init__(self, checksum: StoreChecksum, path: Path, pool: Executor, is_stopped: Callable[[], bool]) -> None:
        self.checksum = checksum
        self._path, self._pool, self._is_stopped = path, pool, is_stopped
        self._bounds = list(accumulate(checksum.part_sizes or (), initial=0))
        self._digests: dict[int, Future[bytes]] = {}

    def begin(self, start: int, end: int, missing: Sequence[tuple[int, int]]) -> None:
        """Begin those that a stretch of the file has made whole.

        Args:
            start: its first byte.
            end: the byte after its last.
            missing: stretches of the file that are not there.
        """
        bounds = self._bounds
        for number in range(bisect_right(bounds, start) - 1, bisect_left(bounds, end)):
            first, last = bounds[number], bounds[number + 1]
            if number not in self._digests and not any(gap < last and gap_end > first for gap, gap_end in missing):
                self._digests[number] = self._pool.submit(
                    _digest, self.checksum.algorithm, self._path, first, last, self._is_stopped
                )

    def match(self) -> bool:
        """Compare the digests of a complete file with those of the store.

        Raises:
            OSError: the file cannot be read.
        """
        self.begin(0, self._bounds[-1], ())
        whole = _ALGORITHMS[self.checksum.algorithm]()
        for number in range(len(self._bounds) - 1):
            whole.update(self._digests[number].result())
        return whole.digest() == self.checksum.value


def _digest(algorithm: str, path: Path, start: int, end: int, is_stopped: Callable[[], bool]) -> bytes:
    """Compute the checksum of a range of a file."""
    digest = _ALGORITHMS[algorithm]()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end and not is_stopped() and (count := file.readinto(buffer[: end - start])):
            digest.update(buffer[:count])
            start += count
    return digest.digest()


def etag_md5(etag: str | None) -> tuple[bytes, int | None] | None:
    """Read MD5 and number of parts from an ETag; else None."""
    match = _MD5.fullmatch(etag or "")
    return None if match is None else (bytes.fromhex(match[1]), int(match[2]) if match[2] else None)


def from_headers(headers: Mapping[str, str], part_sizes: Sequence[int] | None) -> StoreChecksum | None:
    """Choose the cheapest checksum that S3 sent with an object.

    Args:
        headers: of the answer, with names in lower case.
        part_sizes: bytes of each of its parts, where known.
    """
    for algorithm in _ALGORITHMS:
        value = headers.get(f"x-amz-checksum-{algorithm}")
        if value is None:
            continue
        digest, dash, parts = value.partition("-")
        if not dash:
            return StoreChecksum(algorithm, base64.b64decode(digest))
        if part_sizes is not None and len(part_sizes) == int(parts):
            return StoreChecksum(algorithm, base64.b64decode(digest), part_sizes)
    is_encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    found = etag_md5(headers.get("etag"))
    if found is None or is_encrypted or "x-amz-server-side-encryption-customer-algorithm" in headers:
        return None  # then an ETag is no MD5, whatever it looks like
    digest, parts = found
    if parts is None:
        return StoreChecksum("md5", digest)
    if part_sizes is not None and len(part_sizes) == parts:
        return StoreChecksum("md5", digest, part_sizes)
    return None

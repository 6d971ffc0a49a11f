"""Compares a file with the checksum that its store has of it."""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import frozen
from awscrt.checksums import crc32c, crc64nvme

__all__ = ["StoreChecksum", "etag_md5", "from_headers"]

_BLOCK = 2**20  # bytes read at once
_MD5: Final = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')


class _CRC:
    """A CRC with the interface of `hashlib`."""

    def __init__(self, function: Callable[[Any, int], int], size: int) -> None:
        self._function, self._size, self._value = function, size, 0

    def update(self, data: Any) -> None:
        """Go on with more bytes."""
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        """The checksum, big-endian."""
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
    """What a store says of an object's content.

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
        """Read a file, and compare. Where ``is_stopped`` says so it ends early; the answer is then of no use."""
        return self._of(path, is_stopped) == self.value

    def _of(self, path: Path, is_stopped: Callable[[], bool]) -> bytes:
        make = _ALGORITHMS[self.algorithm]
        whole = make()
        buffer = memoryview(bytearray(_BLOCK))
        with path.open("rb", buffering=0) as file:
            for size in self.part_sizes or ():
                part, left = make(), size
                while not is_stopped() and (count := file.readinto(buffer[: min(left, _BLOCK)])):
                    part.update(buffer[:count])
                    left -= count
                whole.update(part.digest())
            while self.part_sizes is None and not is_stopped() and (count := file.readinto(buffer)):
                whole.update(buffer[:count])
        return whole.digest()


def etag_md5(etag: str | None) -> tuple[bytes, int | None] | None:
    """The MD5 that an ETag is, and of how many parts; None for an ETag that is none."""
    match = _MD5.fullmatch(etag or "")
    return None if match is None else (bytes.fromhex(match[1]), int(match[2]) if match[2] else None)


def from_headers(headers: Mapping[str, str], part_sizes: Sequence[int] | None) -> StoreChecksum | None:
    """The cheapest checksum that S3 sent with an object.

    Args:
        headers: of the answer, with names in lower case.
        part_sizes: bytes of each of its parts, where that is known.
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

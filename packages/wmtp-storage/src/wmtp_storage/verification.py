"""Verification of fetched files against the store's checksums.

It runs in parallel with the transfer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from wmtp.cores import usable_cores
from wmtp.errors import WMTPError
from wmtp_storage.checksums import PartDigests, StoreChecksum
from wmtp_storage.journal import Journal, whole_checksum
from wmtp_storage.work import Part

if TYPE_CHECKING:
    from wmtp_storage.backend import StoredObject
    from wmtp_storage.client import Opened
    from wmtp_storage.uris import RemoteURI

__all__ = ["Verification"]

logger = logging.getLogger("wmtp.storage")

#: threads that ask the store for checksums, compare files with them, and wait for the disk
_VERIFIERS = 8
#: a file may be found damaged so often before the store itself is held to be so
_ATTEMPTS = 2


class Verification:
    """Verification state of a transfer's files.

    Args:
        opened: the store.
        uri: the folder or file that the objects are of.
        parts: the files.
        journal: told of files that must come again from their beginning.
        fetch_again: called with a file that was damaged on its way.
    """

    def __init__(
        self, opened: Opened, uri: RemoteURI, parts: Iterable[Part], journal: Journal, fetch_again: Callable[[Part], None]
    ) -> None:
        self._opened, self._uri = opened, uri
        self._journal, self._fetch_again = journal, fetch_again
        self._pool = ThreadPoolExecutor(max_workers=_VERIFIERS, thread_name_prefix="wmtp-verify")
        self._hashers = ThreadPoolExecutor(max_workers=min(8, usable_cores()), thread_name_prefix="wmtp-hash")
        self._stopped = threading.Event()
        #: what the listing says already, and what the store was asked for
        self._told: dict[Part, StoreChecksum] = {}
        self._expected: dict[Part, Future[StoreChecksum | None]] = {}
        self._digests: dict[Part, PartDigests] = {}
        self._parts = list(parts)
        self._left = set(self._parts)
        self._failed: BaseException | None = None

    def start(self) -> None:
        """Ask for unknown checksums, and verify files that are whole already."""
        for part in self._parts:
            if (told := self._listed_checksum(part.stored)) is not None:
                self._told[part] = told
            else:  # asked at the beginning, not when the last byte has come
                self._expected[part] = self._pool.submit(self._opened.checksum, part.stored, False)
        for part in self._parts:
            if not part.missing:
                self._pool.submit(self._verify, part)

    def stop(self) -> None:
        """Cancel all running work."""
        self._stopped.set()
        for pool in (self._pool, self._hashers):
            pool.shutdown(cancel_futures=True)

    def is_done(self) -> bool:
        """Return True once all files are verified and on disk.

        Raises:
            WMTPError: one could not be read or written, or twice differed from the store's checksum.
        """
        if self._failed is not None:
            raise self._failed
        return not self._left

    def came(self, part: Part, start: int, end: int) -> None:
        """Begin to flush and verify a file by a range that came.

        Args:
            part: the file.
            start: the range's first byte.
            end: the byte after its last.
        """
        if part.is_flushed:
            self._pool.submit(part.begin_flush, start, end)
        expected = self._expected.get(part)
        if expected is not None and expected.done() and expected.exception() is None:
            checksum = expected.result()
            if checksum is not None and checksum.part_sizes is not None:
                self._digests_of(part, checksum).begin(start, end, part.missing)

    def whole(self, part: Part) -> None:
        """Verify a file whose last byte came."""
        if self._is_as_told(part):
            part.close()
            self._left.discard(part)
        else:
            self._pool.submit(self._verify, part)

    def _listed_checksum(self, stored: StoredObject) -> StoreChecksum | None:
        """Return the checksum that is known without a request."""
        if stored.hash is not None and stored.hash.startswith("crc64nvme:"):
            return StoreChecksum("crc64nvme", bytes.fromhex(stored.hash.partition(":")[2]))
        return self._opened.listed_checksum(stored)

    def _is_as_told(self, part: Part) -> bool:
        """Verify a small file by the listing's checksum.

        It takes no thread, request or disk access.
        """
        told = self._told.get(part)
        if told is None or part.is_flushed:
            return False
        part.hash = whole_checksum(part.segments)
        if self._compared(part, told):
            part.checked = str(told)
            return True
        return False

    def _digests_of(self, part: Part, checksum: StoreChecksum) -> PartDigests:
        """Return the checksums of a file's parts, begun so far."""
        if part not in self._digests:
            self._digests[part] = PartDigests(checksum, part.path, self._hashers, self._stopped.is_set)
        return self._digests[part]

    def _verify(self, part: Part) -> None:
        """Compare a whole file with the store's checksum, and flush it."""
        try:
            if self._is_verified(part):
                part.flush()
                self._left.discard(part)
        except OSError as error:
            self._failed = WMTPError(f"{part.path} could not be written or read: {error.strerror or error}")
        except BaseException as error:
            self._failed = error

    def _is_verified(self, part: Part) -> bool:
        """Compare a file with the store's checksum.

        One that differs is fetched once more.

        Raises:
            WMTPError: it differs again.
        """
        stored = part.stored
        part.open()  # an empty file is made here
        part.close()
        part.hash = whole_checksum(part.segments)
        expected = self._told[part] if part in self._told else self._expected[part].result()
        if expected is None or self._matches(part, expected):
            part.checked = None if expected is None else str(expected)
            return True
        if not stored.size:  # nothing can come again: its ETag is no MD5
            part.checked = None
            return True
        closer = self._opened.checksum(stored, True) if stored.hash is None else expected
        if closer != expected and (closer is None or self._matches(part, closer)):
            part.checked = None if closer is None else str(closer)
            return True
        # nothing of it is kept: which of its bytes are wrong is not known
        part.segments.clear()
        self._digests.pop(part, None)
        part.md5 = part.hash = None
        part.path.unlink()  # it may be linked to a file that somebody uses
        self._journal.add_file(stored.name, stored.size, stored.identity)
        name = self._uri.at(stored.name)
        part.attempts += 1
        if part.attempts >= _ATTEMPTS:
            raise WMTPError(
                f"{name}: what was received does not match the store's checksum ({expected}), and neither did it when it was"
                " fetched once more: the object is damaged, or something changes it on its way"
            )
        logger.warning("%s was damaged on its way (its %s differs); fetching it again", name, expected)
        self._fetch_again(part)
        return False

    def _matches(self, part: Part, expected: StoreChecksum) -> bool:
        compared = self._compared(part, expected)
        if compared is not None:
            return compared
        if expected.part_sizes is None:
            return expected.matches(part.path, self._stopped.is_set)
        digests = self._digests_of(part, expected)
        if digests.checksum != expected:  # the store was asked once more, and said something else
            del self._digests[part]
            digests = self._digests_of(part, expected)
        return digests.match()

    def _compared(self, part: Part, expected: StoreChecksum) -> bool | None:
        """Compare by received bytes; None where the file must be read."""
        if expected.part_sizes is None and expected.algorithm == "crc64nvme":
            return part.hash == int.from_bytes(expected.value, "big")
        if expected.part_sizes is None and expected.algorithm == "md5" and part.md5 is not None:
            return part.md5 == expected.value.hex()
        return None

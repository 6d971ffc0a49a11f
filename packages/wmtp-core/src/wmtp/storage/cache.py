"""Cache of remote files, one entry for each URI and content.

Files are used in place.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attrs import frozen

from wmtp.errors import WMTPError
from wmtp.sizes import file_size
from wmtp.storage.lock import FileLock
from wmtp.storage.manifest import Manifest, verify

__all__ = ["Cache", "CacheEntry", "CacheInfo", "origin"]

_MARKER: Final = "complete.json"
_FILES: Final = "files"
_FILLING: Final = "filling.lock"
_LENGTH: Final = 32  # hexadecimal digits of an entry's name

#: locks of the entries that this process uses: nobody may remove them before it ends
_in_use: dict[Path, FileLock] = {}
_in_use_guard = threading.Lock()


@frozen(kw_only=True)
class CacheInfo:
    """Entry as ``wmtp cache list`` shows it.

    Args:
        path: its folder.
        uri: its source; None for one that is not complete.
        size: bytes on the disk.
        files: how many.
        last_used: seconds since 1970.
        is_in_use: whether a process uses or fills it.
    """

    path: Path
    uri: str | None
    size: int
    files: int
    last_used: float
    is_in_use: bool


@frozen
class CacheEntry:
    """Files of a URI, as they were at one time.

    Args:
        folder: where it is.
    """

    folder: Path

    @property
    def files(self) -> Path:
        """Folder with the file or the folder that was fetched."""
        return self.folder / _FILES

    def lock(self) -> FileLock:
        """Make the lock of the entry.

        Held alone by who removes the entry, shared by who fills or uses it.

        Raises:
            WMTPError: nothing can be written there.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WMTPError(f"the cache {self.folder.parent} cannot be written to: {error.strerror}") from error
        return FileLock(self.folder.with_suffix(".lock"))

    def filling(self) -> FileLock:
        """Make the lock of filling the entry.

        Held alone by who fills it, for no longer than that. To be taken by who has the other lock already.

        It is a lock of its own because who has filled an entry goes on to use it, perhaps for days: whoever waits to fill it
        must be told when it is full, not when it is free.

        Raises:
            OSError: nothing can be written there.
        """
        self.folder.mkdir(exist_ok=True)
        return FileLock(self.folder / _FILLING)

    def manifest(self) -> Manifest | None:
        """Read the manifest; None unless the entry is complete."""
        try:
            return Manifest.read(self.folder / _MARKER)
        except WMTPError:  # damaged: it is filled anew
            return None

    def is_complete(self) -> bool:
        """Return True if all files are there, with their sizes."""
        manifest = self.manifest()
        return manifest is not None and all(file_size(self.files / file.name) == file.size for file in manifest.files)

    def complete(self, manifest: Manifest) -> None:
        """Say that all of it is there, and on the disk.

        Args:
            manifest: its names are relative to `files`.
        """
        manifest.write(self.folder / _MARKER)

    def use(self, lock: FileLock) -> None:
        """Keep the entry until this process ends, and note its use.

        Args:
            lock: held already, shared.
        """
        os.utime(self.folder / _MARKER)
        with _in_use_guard:
            previous = _in_use.get(self.folder)
            _in_use[self.folder] = lock
        if previous is not None:
            previous.release()


class Cache:
    """All entries of a folder.

    Args:
        folder: where they are; it need not be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entry(self, uri: str, identity: str) -> CacheEntry:
        """Return the entry for a URI and the identity of its content.

        Args:
            uri: without anything secret.
            identity: of the present content; other content has another.
        """
        digest = hashlib.sha256(f"{uri}\n{identity}".encode()).hexdigest()
        return CacheEntry(self.folder / digest[:_LENGTH])

    def entries(self) -> Iterator[CacheEntry]:
        """Those that are there, complete or not."""
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if path.is_dir() and len(path.name) == _LENGTH and not set(path.name) - set("0123456789abcdef"):
                    yield CacheEntry(path)

    def list(self) -> list[CacheInfo]:
        """List the entries, the last used first."""
        found = [_info(entry) for entry in self.entries()]
        return sorted(found, key=lambda info: info.last_used, reverse=True)

    def verify(self) -> list[str]:
        """Compare all files of complete entries with what was fetched.

        Returns one line for each that differs.
        """
        problems = []
        for entry in self.entries():
            manifest = entry.manifest()
            if manifest is not None:
                problems += verify(entry.files, manifest.files)
        return problems

    def prune(self, max_size: int) -> list[CacheInfo]:
        """Remove failed fetches, then least recently used entries, until it fits.

        What a process uses or fills now stays.

        Args:
            max_size: bytes.

        Returns:
            what was removed.
        """
        entries = {info.path: info for info in self.list()}
        size = sum(info.size for info in entries.values())
        removed = []
        for info in sorted(entries.values(), key=lambda info: (info.uri is not None, info.last_used)):
            if info.uri is not None and size <= max_size:
                break
            if _remove(CacheEntry(info.path)):
                removed.append(info)
                size -= info.size
        return removed


def origin(text: str) -> str | None:
    """Find the URI of a cached path in ``text``, for messages.

    None where there is none.
    """
    with _in_use_guard:
        folders = [folder for folder in _in_use if str(folder) in text]
    manifests = [CacheEntry(folder).manifest() for folder in folders]
    return next((manifest.uri for manifest in manifests if manifest is not None), None)


def _remove(entry: CacheEntry) -> bool:
    if entry.folder in _in_use:
        return False
    lock = entry.lock()
    if not lock.acquire(wait=False):
        lock.release()
        return False
    (entry.folder / _MARKER).unlink(missing_ok=True)  # first, so that a rest of it is never taken for complete
    shutil.rmtree(entry.folder, ignore_errors=True)
    lock.remove()
    return True


def _info(entry: CacheEntry) -> CacheInfo:
    manifest = entry.manifest()
    paths = [path for path in entry.folder.rglob("*") if path.is_file()]
    marker = entry.folder / _MARKER
    return CacheInfo(
        path=entry.folder,
        uri=None if manifest is None else manifest.uri,
        size=sum(file_size(path) for path in paths),
        files=len(paths) if manifest is None else len(manifest.files),
        last_used=(marker if marker.exists() else entry.folder).stat().st_mtime if entry.folder.exists() else time.time(),
        is_in_use=_is_in_use(entry),
    )


def _is_in_use(entry: CacheEntry) -> bool:
    if entry.folder in _in_use:
        return True
    lock = entry.lock()
    try:
        return not lock.acquire(wait=False)
    finally:
        lock.release()


@atexit.register
def _release() -> None:
    for lock in _in_use.values():
        lock.release()

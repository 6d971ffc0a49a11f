"""Locks between processes of one machine, by files.

The system frees them however a process ends.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

__all__ = ["FileLock"]

logger = logging.getLogger("wmtp.storage")


class FileLock:
    """A lock that several processes may share, or one may hold alone.

    Args:
        path: its file; it is made. Its folder must be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, *, shared: bool = False, wait: bool = True, waiting_for: str | None = None) -> bool:
        """Take the lock, or change how it is held.

        Args:
            shared: with others who share it; else alone.
            wait: until it is free.
            waiting_for: what to tell the user, should there be a wait.

        Returns:
            whether it is held now; always, where ``wait``.

        Raises:
            OSError: the file cannot be opened.
        """
        while True:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(self._descriptor, shared=shared, wait=False):
                if not wait:
                    return False
                if waiting_for is not None:
                    logger.info("waiting for another process that %s", waiting_for)
                    waiting_for = None
                _lock(self._descriptor, shared=shared, wait=True)
            if self._is_in_place():
                return True
            self.release()  # somebody removed the file while we waited: it locks nothing any more

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Remove the file of a lock held alone, and release it."""
        self._path.unlink(missing_ok=True)
        self.release()

    def _is_in_place(self) -> bool:
        assert self._descriptor is not None, "called while the lock is held"
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        held = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _lock(descriptor: int, *, shared: bool, wait: bool) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            # neither shared nor waited for: files are still whole, since they appear by renaming; work may be done twice
            if not shared and not wait:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    return True

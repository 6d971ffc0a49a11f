"""The contract of a storage backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

__all__ = ["Storage"]


class Storage(ABC):
    """Serves the URIs of some schemes."""

    @abstractmethod
    def exists(self, uri: str) -> bool:
        """Whether ``uri`` names a file or a folder that can be read."""

    @abstractmethod
    def localize(self, uri: str, cache_dir: Path) -> Path:
        """Make the file or folder at ``uri`` readable on this machine, and return its local path.

        Args:
            uri: an absolute URI of one of the backend's schemes.
            cache_dir: where files that had to be fetched are kept. Fetched files appear whole or not at all.

        Raises:
            WMTPError: nothing is there, or it could not be read; the message names the URI.
        """

    @abstractmethod
    def push(self, path: Path, uri: str) -> None:
        """Copy the file or folder ``path`` to ``uri``, which afterwards is whole or, on an error, as it was.

        Raises:
            WMTPError: it could not be written; the message names the URI.
        """

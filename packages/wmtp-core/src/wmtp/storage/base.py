"""Contract of a storage backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

from wmtp.errors import WMTPError
from wmtp.plugins.contract import Contract

__all__ = ["Fetched", "Leftover", "Storage", "StoredFile"]


@frozen(kw_only=True)
class StoredFile:
    """A file in a storage.

    Args:
        name: its path in the folder that was asked for, with ``/``; the file's own name where the URI names a file.
        size: bytes.
        identity: changes with the content; an ETag, for instance.
    """

    name: str
    size: int
    identity: str


@frozen(kw_only=True)
class Fetched:
    """Result of `Storage.fetch`.

    Args:
        uri: the source, without secrets.
        target: the folder.
        files: how many are there now.
        checked: how many of them were compared with a checksum of the store's; of the others it gave the size alone.
        size: their bytes.
        transferred: bytes that were downloaded; the others were there already.
        seconds: duration.
    """

    uri: str
    target: Path
    files: int
    checked: int = 0
    size: int
    transferred: int
    seconds: float


@frozen(kw_only=True)
class Leftover:
    """Remains of an upload or copy that was killed.

    Args:
        uri: where.
        kind: for people: ``half-written folder``, ``unfinished upload``, …
        size: its bytes; None where the store does not say.
        age: seconds since something was added to it.
        is_removable: False for a folder with files that were there before.
    """

    uri: str
    kind: str
    size: int | None
    age: float
    is_removable: bool = True


class Storage(Contract, ABC, contract=True):
    """Serves the URIs of some schemes.

    A backend must have `exists`, `localize` and `push`. The other methods have defaults: `fetch` copies what `localize` gives;
    `files` and `remove` say that the backend cannot do it; `pinned` gives the URI itself; `check_push` finds nothing.
    """

    @abstractmethod
    def exists(self, uri: str) -> bool:
        """Return True if ``uri`` names a readable file or folder."""

    @abstractmethod
    def localize(self, uri: str, cache_dir: Path) -> Path:
        """Return a local path of the file or folder at ``uri``.

        It is fetched if it is not on this machine.

        Args:
            uri: an absolute URI of one of the backend's schemes.
            cache_dir: where files that had to be fetched are kept. Fetched files appear whole or not at all.

        Raises:
            WMTPError: nothing is there, or it could not be read; the message names the URI.
        """

    @abstractmethod
    def push(self, path: Path, uri: str) -> None:
        """Copy the file or folder ``path`` to ``uri``, atomically.

        On an error ``uri`` is as it was.

        Raises:
            WMTPError: it could not be written; the message names the URI.
        """

    def pinned(self, uri: str) -> str:
        """Return a URI that keeps naming the present content.

        Default: ``uri``, where versions have no names.

        Raises:
            ConfigError: nothing is there; the message names the URI.
            WMTPError: the backend could not be asked.
        """
        return uri

    def check_push(self, uri: str) -> None:
        """Raise if `push` to ``uri`` would be refused.

        Only as far as it can be known before. Writes nothing.

        Raises:
            ConfigError: it would; the message says what to do.
            WMTPError: the backend could not be asked.
        """

    def fetch(self, uri: str, target: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Fetched:
        """Copy the file or folder at ``uri`` into ``target``.

        A manifest is written beside it. Files appear under their names when all of them are whole, and compared with what the
        store says of them; other files in ``target`` stay. Called again after a failure it continues, where the backend can.

        Args:
            uri: as for `localize`.
            target: a folder; it is made.
            include: patterns; where there are any, a file's name must match one.
            exclude: patterns of names to leave out.

        Raises:
            WMTPError: nothing is there, it could not be read or written; the message names the URI or the path.
        """
        from wmtp.storage.copying import copy_into

        return copy_into(self, uri, target, include, exclude)

    def files(self, uri: str) -> Iterator[StoredFile]:
        """Yield the files of the folder at ``uri``, or the file itself.

        Nothing is yielded where nothing is there.

        Raises:
            WMTPError: the backend cannot tell, or could not be asked.
        """
        raise WMTPError(f"{uri}: {type(self).__name__} cannot list files")

    def remove(self, uri: str) -> None:
        """Delete the file or folder at ``uri``, if there is one.

        Raises:
            WMTPError: the backend cannot, or failed.
        """
        raise WMTPError(f"{uri}: {type(self).__name__} cannot delete")

    def tidy(self, uri: str) -> None:
        """Remove what killed pushes left half-written in the folder ``uri``.

        Only for the one writer of that folder.

        Raises:
            WMTPError: it could not be removed; the message names the URI.
        """

    def clean(self, uri: str, *, older_than: float, dry_run: bool = False) -> Sequence[Leftover]:
        """Remove what killed pushes left at ``uri`` and beside it.

        Default: nothing is ever left.

        Args:
            uri: a file or a folder.
            older_than: seconds: who writes there now must not lose its work.
            dry_run: only find it.

        Returns:
            what was found. All of it is removed but what is not ``is_removable``.

        Raises:
            WMTPError: the backend could not be asked, or something could not be removed.
        """
        return ()

"""Listing of the objects to fetch from a URI."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from wmtp.errors import FileError, WMTPError
from wmtp.storage.copying import is_wanted
from wmtp.storage.manifest import MANIFEST
from wmtp_storage.failures import WrongAnswerError
from wmtp_storage.leftovers import INCOMPLETE

if TYPE_CHECKING:
    from wmtp_storage.backend import ObjectStorage, StoredObject
    from wmtp_storage.uris import RemoteURI

__all__ = ["STATE_FOLDER", "Listing", "list_objects"]

#: in the target: what a transfer has so far
STATE_FOLDER = ".wmtp-fetch"
_LONGEST = 255  # bytes of a file's name


@frozen
class Listing:
    """Objects of a URI.

    Args:
        objects: by name.
        is_folder: whether the URI names a folder; else there is one object.
    """

    objects: tuple[StoredObject, ...]
    is_folder: bool

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(stored.size for stored in self.objects)

    @property
    def identity(self) -> str:
        """Differs where the name, size or content of an object does."""
        return "\n".join(f"{stored.name}\t{stored.size}\t{stored.identity}" for stored in self.objects)


def list_objects(storage: ObjectStorage, uri: RemoteURI, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Listing:
    """Ask the store what is at ``uri``.

    Args:
        storage: the backend.
        uri: an object or a folder.
        include: patterns; where there are any, a file's name in the folder must match one.
        exclude: patterns of names to leave out.

    Raises:
        WMTPError: nothing is there, a folder is half-written, or its names cannot be those of files.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:  # over a long line one request after the other takes twice as long
        listed = pool.submit(lambda: list(storage.objects(uri)))
        single = storage.head(uri)
        if single is not None:
            if isinstance(wrong := listed.exception(), WrongAnswerError):  # who answered that may have answered this too
                raise wrong
            return Listing((single,), is_folder=False)
        found = listed.result()
    if any(stored.name == INCOMPLETE for stored in found):
        raise WMTPError(f"{uri}: the folder is half-written: whoever uploads to it has not ended, or failed; upload it again")
    if not found:
        raise FileError(_nothing_at(storage, uri))
    found = [stored for stored in found if stored.name != MANIFEST and stored.name.partition("/")[0] != STATE_FOLDER]
    found = _once_each(storage, uri, [stored for stored in found if is_wanted(stored.name, include, exclude)])
    for stored in found:
        if problem := _name_problem(stored.name):
            raise WMTPError(f"{uri}: the name {stored.name!r} {problem}; leave it out with --exclude, or rename it")
    found = _without_markers(storage, uri, found)
    if not found:
        what = "matches the patterns" if include or exclude else "is a file"
        raise FileError(f"{uri}: nothing there {what}")
    return Listing(tuple(sorted(found, key=lambda stored: stored.name)), is_folder=True)


def _name_problem(name: str) -> str | None:
    """Tell why no file in a folder can have this name.

    It may point outside the folder.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name:
        return "cannot be that of a file in a folder"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return "holds a control character"
    if any(len(os.fsencode(part)) > _LONGEST for part in parts):
        return f"has a part of more than {_LONGEST} bytes, which disks do not take"
    return None


def _once_each(storage: ObjectStorage, uri: RemoteURI, found: list[StoredObject]) -> list[StoredObject]:
    """Drop what a listing names a second time.

    An empty object is the mark of a folder, which obstore lists without its slash. Of two versions of an object, as stores list
    them that are slow to agree, the one counts that is there when it is asked for.

    Raises:
        WrongAnswerError: an object is listed twice, and does not exist.
    """
    kept: dict[str, StoredObject] = {}
    twice: set[str] = set()
    for stored in found:
        other = kept.setdefault(stored.name, stored)
        if not other.size:
            kept[stored.name] = stored
        elif stored.size and (other.size, other.identity) != (stored.size, stored.identity):
            twice.add(stored.name)
    for name in sorted(twice):
        now = storage.head(uri.at(name))
        if now is None:
            raise WrongAnswerError(f"{uri}: {name!r} was listed twice, as two versions, and does not exist; run it again")
        kept[name] = evolve(now, name=name)
    return list(kept.values())


def _without_markers(storage: ObjectStorage, uri: RemoteURI, found: list[StoredObject]) -> list[StoredObject]:
    """Leave out the empty objects by which consoles show folders.

    obstore lists such an object (``models/``) without its slash.
    """
    folders = {str(parent) for stored in found for parent in PurePosixPath(stored.name).parents} - {"."}
    kept = []
    for stored in found:
        if stored.name in folders:
            if stored.size:
                inside = next(other.name for other in found if other.name.startswith(f"{stored.name}/"))
                raise WMTPError(
                    f"{uri}: {stored.name!r} is an object, and a folder too, for {inside!r}; no disk can hold both. Leave one"
                    " out with --exclude, or rename it"
                )
            continue
        if stored.size == 0 and storage.head(uri.at(stored.name)) is None:
            continue
        kept.append(stored)
    return kept


def _nothing_at(storage: ObjectStorage, uri: RemoteURI) -> str:
    """Write the message for a URI that names nothing.

    It lists similar names in the nearest existing folder.
    """
    if not uri.key:
        return f"{uri}: the bucket is empty"
    steps = uri.key.split("/")
    for depth in reversed(range(len(steps))):
        parent = evolve(uri, key="/".join(steps[:depth]), is_folder=False)
        try:
            paths = list(storage.opened(uri).names(f"{parent.key}/" if parent.key else ""))
        except Exception:  # the answer is for a hint only
            return f"{uri}: nothing is there"
        if names := [PurePosixPath(path).name for path in paths]:
            close = difflib.get_close_matches(steps[depth], names, n=3) or sorted(names)[:5]
            return f"{uri}: nothing is there; in {parent} there is: {', '.join(close)}"
    return f"{uri}: nothing is there; the bucket is empty"

"""Remains of killed uploads.

Half-written folders, folders beside their target, and unfinished uploads of S3.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

import obstore
from attrs import evolve, frozen

from wmtp.storage.base import Leftover
from wmtp_storage.arrival import check_gone
from wmtp_storage.failures import explained
from wmtp_storage.retrying import with_retries

if TYPE_CHECKING:
    from wmtp_storage.backend import ObjectStorage, StoredObject
    from wmtp_storage.uris import RemoteURI

__all__ = [
    "INCOMPLETE",
    "REPLACING",
    "STAGING",
    "Found",
    "Unfinished",
    "find",
    "is_at",
    "remove",
    "remove_leftovers",
    "staging_folders",
]

#: stands in a folder while it is written or replaced: who finds it must not read the folder
INCOMPLETE = ".wmtp-incomplete"
#: what the mark says in a folder that held something before: its files are somebody's, and never removed for it
REPLACING = b"This folder is being replaced, or was left half-replaced.\n"
STAGING = re.compile(r"\.partial-[0-9a-f]{16}$")


@frozen
class Unfinished:
    """Unfinished upload, of which the store holds parts.

    Args:
        key: of the object that it would be.
        upload: the store's name for it.
        began: when.
    """

    key: str
    upload: str
    began: datetime


@frozen
class Found:
    """Remains of one upload, with what is to be removed.

    Args:
        leftover: for the user.
        keys: of its objects.
        unfinished: its parts of objects.
    """

    leftover: Leftover
    keys: tuple[str, ...] = ()
    unfinished: tuple[Unfinished, ...] = ()


def find(storage: ObjectStorage, uri: RemoteURI, older_than: float) -> list[Found]:
    """Find what was left at ``uri``, inside it and beside it.

    Args:
        storage: the backend.
        uri: an object or a folder.
        older_than: seconds since the last byte that was added to it.

    Raises:
        WMTPError: the store could not be asked.
    """
    now = time.time()
    unfinished = [each for each in storage.opened(uri).unfinished(uri.key) if is_at(each.key, uri.key)]
    folders: dict[str, list[StoredObject]] = {}
    objects = [*storage.objects(uri), *(found for folder in staging_folders(storage, uri) for found in folder)]
    half = {found.key.rpartition("/")[0] for found in objects if found.key.rpartition("/")[2] == INCOMPLETE}
    for found in objects:
        steps = found.key.split("/")
        parents = ["/".join(steps[:depth]) for depth in range(len(steps))]
        if (owner := next((p for p in parents if STAGING.search(p) or p in half), None)) is not None:
            folders.setdefault(owner, []).append(found)
    result = []
    for folder, contents in folders.items():
        inside = tuple(each for each in unfinished if each.key.startswith(f"{folder}/"))
        age = now - max(m.timestamp() for m in (*(o.modified for o in contents), *(u.began for u in inside)))
        if age < older_than:
            unfinished = [each for each in unfinished if each not in inside]
            continue
        place = evolve(uri, key=folder, is_folder=False)
        kind, keys = "folder of an unfinished replacement", tuple(each.key for each in contents)
        if not STAGING.search(folder):
            is_old = _mark(storage, place) == REPLACING
            kind, keys = ("half-replaced folder", ()) if is_old else ("half-written folder", keys)
        size = sum(each.size for each in contents)
        left = Leftover(uri=str(place), kind=kind, size=size, age=age, is_removable=bool(keys))
        result.append(Found(left, keys))
    for each in unfinished:
        if (age := now - each.began.timestamp()) >= older_than:
            place = evolve(uri, key=each.key, is_folder=False)
            left = Leftover(uri=str(place), kind="unfinished upload", size=None, age=age)
            result.append(Found(left, unfinished=(each,)))
    return result


def is_at(key: str, place: str) -> bool:
    """Tell whether an object is at a place, or inside it.

    What a replacement wrote beside the place counts too.
    """
    return not place or re.match(rf"{re.escape(place)}(\.partial-[0-9a-f]{{16}})?(/|$)", key) is not None


def staging_folders(storage: ObjectStorage, uri: RemoteURI) -> list[list[StoredObject]]:
    """List the objects of each folder that replacements wrote beside ``uri``."""
    beside = f"{uri.key}.partial-"
    parent = uri.key.rpartition("/")[0]
    # S3 lists by any beginning of a key, others by whole folders
    begin = beside if uri.scheme == "s3" else f"{parent}/" if parent else ""
    try:
        names = storage.opened(uri).names(begin)
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        if uri.scheme.startswith("http"):  # few web servers list
            return []
        raise explained(error, uri, "listed") from error
    folders = sorted({name for each in names if (name := each.rstrip("/")).startswith(beside) and STAGING.search(name)})
    return [list(storage.objects(evolve(uri, key=folder, is_folder=False))) for folder in folders]


def _mark(storage: ObjectStorage, folder: RemoteURI) -> bytes:
    place = folder.at(INCOMPLETE)
    try:
        store = storage.opened(place).store
        return with_retries(storage.config.retry_timeout, place, lambda: bytes(obstore.get(store, place.key).bytes()))
    except FileNotFoundError:  # it was whole a moment later
        return REPLACING
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        raise explained(error, place) from error


def remove(storage: ObjectStorage, uri: RemoteURI, keys: Iterable[str]) -> None:
    """Delete objects.

    Raises:
        WMTPError: some of them could not be deleted.
    """
    names = list(keys)
    try:
        with_retries(storage.config.retry_timeout, uri, lambda: obstore.delete(storage.opened(uri).store, names))
    except FileNotFoundError:  # somebody else was quicker
        pass
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        raise explained(error, uri, "deleted") from error
    check_gone(storage, uri, names)


def remove_leftovers(storage: ObjectStorage, uri: RemoteURI) -> None:
    """Remove the folders inside ``uri`` that a killed `push` left.

    Those that were never whole, and those beside their target.

    Raises:
        WMTPError: some of it could not be removed.
    """
    objects = list(storage.objects(uri))
    folders: dict[str, set[str]] = {}
    for found in objects:
        folder, _, name = found.name.partition("/")
        folders.setdefault(folder, set()).add(name)
    # the mark is asked for again: the listing may be one of yesterday, out of the cache of a proxy
    half = {
        folder
        for folder, names in folders.items()
        if STAGING.search(folder) or (INCOMPLETE in names and storage.head(uri.at(f"{folder}/{INCOMPLETE}")) is not None)
    }
    remove(storage, uri, [found.key for found in objects if found.name.partition("/")[0] in half])

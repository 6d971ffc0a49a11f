"""Checks that uploads and deletions were done.

An answer with status 200 may have come from a proxy, and nothing have been done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from attrs import frozen

from wmtp_storage.failures import WrongAnswerError, explained

if TYPE_CHECKING:
    from wmtp_storage.backend import ObjectStorage, StoredObject
    from wmtp_storage.uris import RemoteURI

__all__ = ["Uploaded", "check_arrived", "check_gone"]

_AT_ONCE = 16  # requests side by side


@frozen
class Uploaded:
    """An upload as the store answered it.

    Args:
        size: bytes that were sent.
        etag: of the object; None where it said none.
    """

    size: int
    etag: str | None = None


def check_arrived(storage: ObjectStorage, uri: RemoteURI, uploaded: Mapping[str, Uploaded]) -> None:
    """Ask the store for what was uploaded.

    Args:
        storage: the backend.
        uri: of a folder; of a single file where its name in ``uploaded`` is empty.
        uploaded: by name.

    Raises:
        WrongAnswerError: something is not there, or is something else.
        WMTPError: the store could not be asked.
    """
    has_etags = not uri.scheme.startswith("http")  # web servers may make others while a file is new
    for name, found in _asked(storage, uri, list(uploaded)).items():
        sent = uploaded[name]
        is_other = found is not None and has_etags and _differ(found.etag, sent.etag)
        if found is None or found.size != sent.size or is_other:
            what = "does not have it" if found is None else f"has another object of {found.size} bytes there"
            error = WrongAnswerError(f"the upload was answered, but the store {what}")
            raise explained(error, uri.at(name), "uploaded")


def check_gone(storage: ObjectStorage, uri: RemoteURI, keys: Iterable[str]) -> None:
    """Ask a web server for what was deleted.

    Other stores answer a deletion in a form of their own.

    Raises:
        WrongAnswerError: something is there nevertheless.
        WMTPError: the server could not be asked.
    """
    if not uri.scheme.startswith("http"):
        return
    prefix = f"{uri.key}/" if uri.key else ""
    names = [key.removeprefix(prefix) if key != uri.key else "" for key in keys]
    left = next((name for name, found in _side_by_side(storage.head, uri, names).items() if found is not None), None)
    if left is not None:
        raise explained(WrongAnswerError("the deletion was answered, and it is still there"), uri.at(left), "deleted")


def _asked(storage: ObjectStorage, uri: RemoteURI, names: list[str]) -> Mapping[str, StoredObject | None]:
    """Look up each object by its name; None for a missing one.

    A folder is listed where stores can be relied on to list.
    """
    if uri.scheme.startswith("http") or len(names) == 1:
        return _side_by_side(storage.head, uri, names)
    listed = {stored.name: stored for stored in storage.objects(uri)}
    return {name: listed.get(name) for name in names}


def _side_by_side(
    ask: Callable[[RemoteURI], StoredObject | None], uri: RemoteURI, names: list[str]
) -> Mapping[str, StoredObject | None]:
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return dict(zip(names, pool.map(lambda name: ask(uri.at(name)), names), strict=True))


def _differ(one: str | None, other: str | None) -> bool:
    """Compare two ETags, which some stores quote in some answers only."""
    return one is not None and other is not None and one.strip('"') != other.strip('"')

"""Object stores as a storage backend."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from attrs import evolve, frozen
from obstore.exceptions import NotSupportedError

from wmtp.errors import WMTPError
from wmtp.storage import Fetched, Storage, StoredFile
from wmtp.storage.base import Leftover
from wmtp.storage.manifest import MANIFEST, Manifest
from wmtp_storage.failures import WrongAnswerError, explained, understand
from wmtp_storage.fetch import fetch_into
from wmtp_storage.leftovers import find, remove, remove_leftovers
from wmtp_storage.localize import localize
from wmtp_storage.push import push
from wmtp_storage.retrying import with_retries
from wmtp_storage.uris import RemoteURI, parse

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

    from wmtp_storage.client import Opened
    from wmtp_storage.config import RemoteStorage

__all__ = ["ObjectStorage", "StoredObject"]

#: what web servers answer that do not know the request for a folder's content; a refusal (403) leaves it open
_LISTS_NOTHING = (404, 405, 501)

#: whether a store was opened, and whether that was in the process that this one is a fork of
_is_used = _is_forked = False

_Config = TypeVar("_Config", bound="RemoteStorage")
_Answer = TypeVar("_Answer")


def _note_fork() -> None:
    global _is_forked
    _is_forked = _is_used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@frozen
class StoredObject:
    """One object of a store.

    Args:
        key: its full key, as obstore takes it.
        name: its path in the folder that was listed.
        size: bytes.
        etag: what the store calls this version of its content; None where it calls it nothing.
        modified: when its content was last written.
        hash: ``crc64nvme:HEX`` of its content, where a manifest beside it says so.
    """

    key: str
    name: str
    size: int
    etag: str | None
    modified: datetime
    hash: str | None = None

    @property
    def identity(self) -> str:
        """Differs where the content does."""
        return self.etag if self.etag is not None else f"modified {self.modified.isoformat()}"

    def differs_from(self, meta: ObjectMeta) -> bool:
        """Return True if an answer belongs to another version of this object."""
        if meta["size"] != self.size:
            return True
        if self.etag is not None and meta["e_tag"] is not None:
            return meta["e_tag"].strip('"') != self.etag.strip('"')  # Azure quotes it in some answers only
        return meta["last_modified"] != self.modified


class ObjectStorage(Storage):
    """Serves URIs by obstore.

    Args:
        config: the backend's options.
        opener: opens what holds a URI: a bucket, a container, a host.
    """

    def __init__(self, config: _Config, opener: Callable[[_Config, RemoteURI], Opened]) -> None:
        self.config = config
        self._opener: Callable[[Any, RemoteURI], Opened] = opener
        self._open: dict[tuple[str, str, str], Opened] = {}
        self._lock = threading.Lock()

    def opened(self, uri: RemoteURI) -> Opened:
        """Return the client for ``uri``, with credentials and region resolved.

        Raises:
            ConfigError: the options do not fit the URI.
            WMTPError: there are no credentials, or this process is a fork of one that used a store.
        """
        global _is_used
        if _is_forked:  # obstore's threads are not in this process: whatever is asked of it would never be answered
            raise WMTPError(
                f"{uri} cannot be reached from this process: it is a fork of one that has used an object store; start processes"
                " by another method, for instance multiprocessing.set_start_method('spawn')"
            )
        _is_used = True
        place = (uri.scheme, uri.authority, uri.query)
        with self._lock:
            if place not in self._open:
                try:
                    self._open[place] = self._opener(self.config, uri)
                except (obstore.exceptions.BaseError, ValueError) as error:
                    raise explained(error, uri, "opened") from error
            return self._open[place]

    def _asked(self, uri: RemoteURI, request: Callable[[ObjectStore], _Answer]) -> _Answer:
        """Ask the store that holds ``uri``, with retries.

        The request is sent again where it or its answer is lost on the way.
        """
        store = self.opened(uri).store
        return with_retries(self.config.retry_timeout, uri, lambda: request(store))

    def objects(self, uri: RemoteURI) -> Iterator[StoredObject]:
        """Yield the objects of a folder, in pages of a thousand.

        Raises:
            WMTPError: the store could not be asked, or its answer is not a listing.
        """
        prefix = f"{uri.key}/" if uri.key else ""
        if uri.scheme.startswith("http") and (manifest := self._manifest(uri)) is not None:
            yield from self._of_manifest(uri, manifest)
            return
        try:
            for page in self.opened(uri).pages(prefix):
                for meta in page:
                    # some stores take the prefix as a text, and give its neighbours too
                    if meta["path"].startswith(prefix):
                        yield _stored(meta, meta["path"][len(prefix) :])
        except (obstore.exceptions.BaseError, OSError, ValueError, WrongAnswerError) as error:
            if uri.scheme.startswith("http") and _lists_nothing(error):
                return
            raise self._not_listed(error, uri) from error

    def _not_listed(self, error: Exception, uri: RemoteURI) -> WMTPError:
        """Explain a failed listing, with similar names for a missing bucket."""
        close: list[str] = []
        if understand(error).code == "NoSuchBucket":
            close = difflib.get_close_matches(uri.authority, self.opened(uri).buckets(), n=3)
        explanation = explained(error, uri, "listed")
        return WMTPError(f"{explanation}; there is: {', '.join(close)}") if close else explanation

    def _manifest(self, uri: RemoteURI) -> Manifest | None:
        """Read the manifest that the uploader left in a web server's folder."""
        place = uri.at(MANIFEST)
        try:
            return Manifest.loads(self._asked(place, lambda store: bytes(obstore.get(store, place.key).bytes())), place)
        except FileNotFoundError:
            return None
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise explained(error, place) from error

    def _of_manifest(self, uri: RemoteURI, manifest: Manifest) -> Iterator[StoredObject]:
        if wrong := next((file.name for file in manifest.files if {"", ".", ".."} & set(file.name.split("/"))), None):
            raise WMTPError(f"{uri.at(MANIFEST)} names {wrong!r}, which is no file in its folder")
        with ThreadPoolExecutor(max_workers=min(16, self.config.max_connections)) as pool:
            for file, stored in zip(manifest.files, pool.map(lambda f: self.head(uri.at(f.name)), manifest.files), strict=True):
                if stored is None:
                    raise WMTPError(f"{uri.at(file.name)} is in the folder's {MANIFEST}, and does not exist")
                yield evolve(stored, name=file.name, hash=file.hash)

    def head(self, uri: RemoteURI) -> StoredObject | None:
        """Look up the object with exactly this key.

        None where there is none, and for a URI that ends with a slash.

        Raises:
            WMTPError: the store could not be asked, or its answer is not one of an object store.
        """
        if not uri.key or uri.is_folder:
            return None
        try:
            meta = self._asked(uri, lambda store: obstore.head(store, uri.key))
        except FileNotFoundError:
            return None
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise explained(self._with_reason(error, uri), uri) from error
        if meta["e_tag"] is None and not meta["last_modified"].timestamp() and not uri.scheme.startswith("http"):
            raise explained(WrongAnswerError("the answer has neither an ETag nor a time, as every object has"), uri)
        return _stored(meta, PurePosixPath(uri.key).name)

    def _with_reason(self, error: Exception, uri: RemoteURI) -> Exception:
        """Replace a HEAD's error by that of a listing.

        The answer to a HEAD carries no reason.
        """
        failure = understand(error)
        if failure.status in (None, 404) or failure.code or uri.scheme.startswith("http"):
            return error
        try:
            next(self.opened(uri).pages(f"{uri.key}/"), None)
        except WrongAnswerError as reason:
            return reason
        except (obstore.exceptions.BaseError, OSError, ValueError) as reason:
            return reason if understand(reason).code else error
        return error

    def gives_ranges(self, uri: RemoteURI, objects: Sequence[StoredObject]) -> bool:
        """Return True if parts of objects can be requested.

        Simple web servers send whole objects only.

        Raises:
            WMTPError: the server could not be asked.
        """
        probe = next((stored for stored in objects if stored.size > 1), None)
        if probe is None or not uri.scheme.startswith("http"):
            return True
        try:
            self._asked(uri, lambda store: obstore.get_range(store, probe.key, start=0, end=1))
        except FileNotFoundError:  # changed since; whoever fetches it will see
            return True
        except NotSupportedError:
            return False
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise explained(error, uri) from error
        return True

    def exists(self, uri: str) -> bool:
        """Return True for an object or a folder of objects; see `Storage.exists`."""
        place = parse(uri)
        return self.head(place) is not None or next(self.objects(place), None) is not None

    def localize(self, uri: str, cache_dir: Path) -> Path:
        """Fetch into the cache, or use what is there; see `Storage.localize`."""
        return localize(self, parse(uri), cache_dir)

    def fetch(self, uri: str, target: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Fetched:
        """Fetch into a folder; see `Storage.fetch`."""
        return fetch_into(self, parse(uri), target, include, exclude)

    def push(self, path: Path, uri: str) -> None:
        """Upload; see `Storage.push`."""
        push(self, path, parse(uri))

    def files(self, uri: str) -> Iterator[StoredFile]:
        """List; see `Storage.files`."""
        place = parse(uri)
        single = self.head(place)
        for stored in self.objects(place) if single is None else (single,):
            yield StoredFile(name=stored.name, size=stored.size, identity=stored.identity)

    def remove(self, uri: str) -> None:
        """Delete; see `Storage.remove`."""
        place = parse(uri)
        single = self.head(place)
        remove(self, place, [stored.key for stored in ([single] if single is not None else self.objects(place))])

    def tidy(self, uri: str) -> None:
        """See `Storage.tidy`.

        Ends uploads that were left unfinished, and removes folders that were never whole.
        """
        place = parse(uri)
        remove_leftovers(self, place)
        opened = self.opened(place)
        opened.abort(opened.unfinished(f"{place.key}/" if place.key else ""))

    def clean(self, uri: str, *, older_than: float, dry_run: bool = False) -> Sequence[Leftover]:
        """See `Storage.clean`."""
        place = parse(uri)
        found = find(self, place, older_than)
        for each in () if dry_run else found:
            remove(self, place, each.keys)
            self.opened(place).abort(each.unfinished)
        return [each.leftover for each in found]


def _lists_nothing(error: Exception) -> bool:
    """Tell whether a web server has no such folder, or lists none."""
    return isinstance(error, FileNotFoundError) or understand(error).status in _LISTS_NOTHING


def _stored(meta: ObjectMeta, name: str) -> StoredObject:
    return StoredObject(meta["path"], name, meta["size"], meta["e_tag"], meta["last_modified"])

"""Object stores as a storage backend."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from attrs import frozen

from wmtp.errors import WMTPError
from wmtp.storage import Storage
from wmtp.storage.atomic import write_folder
from wmtp_storage.failures import explained
from wmtp_storage.push import push
from wmtp_storage.uris import RemoteURI, parse

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from wmtp_storage.config import RemoteStorage

__all__ = ["ObjectStorage", "StoredObject"]

_Config = TypeVar("_Config", bound="RemoteStorage")


@frozen
class StoredObject:
    """One object of a store.

    Args:
        key: its full key, as obstore takes it.
        name: its path in the folder that was listed.
        size: bytes.
        etag: what the store calls this version of its content; None where it calls it nothing.
        version: of the object, where the store keeps several.
    """

    key: str
    name: str
    size: int
    etag: str | None
    version: str | None = None


class ObjectStorage(Storage):
    """Serves URIs by obstore.

    Args:
        config: the backend's options.
        opener: makes the store that holds a URI.
    """

    def __init__(self, config: _Config, opener: Callable[[_Config, RemoteURI], ObjectStore]) -> None:
        self.config = config
        self._opener: Callable[[Any, RemoteURI], ObjectStore] = opener
        self._stores: dict[tuple[str, str, str], ObjectStore] = {}
        self._lock = threading.Lock()

    def store(self, uri: RemoteURI) -> ObjectStore:
        """The store that holds ``uri``, its credentials found, its region known.

        Raises:
            ConfigError: the options do not fit the URI.
            WMTPError: there are no credentials.
        """
        place = (uri.scheme, uri.authority, uri.query)
        with self._lock:
            if place not in self._stores:
                try:
                    self._stores[place] = self._opener(self.config, uri)
                except obstore.exceptions.BaseError as error:
                    raise explained(error, uri, "opened") from error
            return self._stores[place]

    def objects(self, uri: RemoteURI) -> Iterator[StoredObject]:
        """The objects of a folder, by pages of a thousand; markers of folders are left out.

        Raises:
            WMTPError: the store could not be asked.
        """
        prefix = f"{uri.key}/" if uri.key else ""
        try:
            for page in obstore.list(self.store(uri), prefix=uri.key or None, chunk_size=1000):
                for meta in page:
                    # some stores take the prefix as a text, and give its neighbours too
                    if meta["path"].startswith(prefix):
                        yield StoredObject(
                            meta["path"], meta["path"][len(prefix) :], meta["size"], meta["e_tag"], meta["version"]
                        )
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise explained(error, uri, "listed") from error

    def head(self, uri: RemoteURI) -> StoredObject | None:
        """The object that has exactly this key; None where there is none.

        Raises:
            WMTPError: the store could not be asked.
        """
        if not uri.key:
            return None
        try:
            meta = obstore.head(self.store(uri), uri.key)
        except FileNotFoundError:
            return None
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise explained(error, uri) from error
        return StoredObject(uri.key, PurePosixPath(uri.key).name, meta["size"], meta["e_tag"], meta["version"])

    def exists(self, uri: str) -> bool:
        """Whether an object or a folder of objects is there; see `Storage.exists`."""
        place = parse(uri)
        return self.head(place) is not None or next(self.objects(place), None) is not None

    def localize(self, uri: str, cache_dir: Path) -> Path:
        """Fetch into the cache; see `Storage.localize`."""
        place = parse(uri)
        single = self.head(place)
        found = [single] if single is not None else list(self.objects(place))
        if not found:
            raise WMTPError(f"{uri}: there is no such object, and no folder of this name")
        identity = repr([(stored.key, stored.size, stored.etag) for stored in found])
        target = cache_dir / hashlib.sha256(f"{place}\n{identity}".encode()).hexdigest()[:32]
        name = PurePosixPath(place.key).name or place.authority

        def download(folder: Path) -> None:
            for stored in found:
                path = folder / name if single is not None else folder / name / stored.name
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    answer = obstore.get(self.store(place), stored.key, options={"if_match": stored.etag})
                    with path.open("wb") as file:
                        for piece in answer.stream(min_chunk_size=2**20):
                            file.write(piece)
                except (obstore.exceptions.BaseError, OSError) as error:
                    raise explained(error, place.at(stored.name)) from error

        if not target.exists():
            write_folder(target, download)
        return target / name

    def push(self, path: Path, uri: str) -> None:
        """Upload; see `Storage.push`."""
        push(self, path, parse(uri))

"""Fetching into the cache, whose files are used in place."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from attrs import evolve

from wmtp.errors import WMTPError
from wmtp.storage.cache import Cache, CacheEntry
from wmtp.storage.manifest import Manifest, ManifestFile
from wmtp_storage.fetch import Fetching, listings
from wmtp_storage.listing import STATE_FOLDER, Listing

if TYPE_CHECKING:
    from wmtp_storage.backend import ObjectStorage
    from wmtp_storage.uris import RemoteURI

__all__ = ["localize"]

_CLOCK_TICK = 2.0  # seconds


def localize(storage: ObjectStorage, uri: RemoteURI, cache_dir: Path) -> Path:
    """Return the cache path of ``uri``, fetching it if needed; see `wmtp.storage.Storage.localize`.

    Several processes that ask for the same do the work once: the others wait.
    """
    cache = Cache(cache_dir)
    name = PurePosixPath(uri.key).name or uri.authority

    for listing in listings(storage, uri):
        entry = cache.entry(str(uri), _identity(uri, listing))
        lock = entry.lock()
        try:
            lock.acquire(shared=True, waiting_for=f"removes {uri} from the cache")
            if not (entry.is_complete() or _fill(storage, uri, listing, cache, entry, name)):
                lock.release()
                continue
            entry.use(lock)
        except OSError as error:
            lock.release()
            raise WMTPError(f"the cache {cache_dir} cannot be written to: {error.strerror or error}") from error
        except BaseException:
            lock.release()
            raise
        return entry.files / name
    raise AssertionError("listings() ends with an error")


def _identity(uri: RemoteURI, listing: Listing) -> str:
    """Return the identity that names the cache entry.

    Web servers date versions by seconds: a file written just now may be written again under the same date. It gets an entry
    that is never found again.
    """
    newest = max(stored.modified.timestamp() for stored in listing.objects)
    if uri.scheme.startswith("http") and time.time() - newest < _CLOCK_TICK:
        return f"{listing.identity}\n{uuid.uuid4()}"
    return listing.identity


def _fill(storage: ObjectStorage, uri: RemoteURI, listing: Listing, cache: Cache, entry: CacheEntry, name: str) -> bool:
    """Fetch into an entry, or wait for another process that does.

    False where the objects changed meanwhile.
    """
    with entry.filling() as filling:
        filling.acquire(waiting_for=f"fetches {uri}")
        return entry.is_complete() or _fetch(storage, uri, listing, cache, entry, name)


def _fetch(storage: ObjectStorage, uri: RemoteURI, listing: Listing, cache: Cache, entry: CacheEntry, name: str) -> bool:
    folder, prefix = (entry.files / name, f"{name}/") if listing.is_folder else (entry.files, "")
    state = entry.folder / STATE_FOLDER
    state.mkdir(parents=True, exist_ok=True)
    # a web server's name for a version is not certain enough to take a file of another entry for the same
    others = {} if uri.scheme.startswith("http") else _others(cache, entry, str(uri), prefix)
    fetching = Fetching(storage, uri, listing, folder, state, {}, others)
    if not fetching.transfer():
        return False
    files = fetching.commit()
    entry.complete(Manifest(uri=str(uri), files=tuple(evolve(file, name=prefix + file.name) for file in files)))
    shutil.rmtree(state, ignore_errors=True)
    return True


def _others(cache: Cache, entry: CacheEntry, uri: str, prefix: str) -> Mapping[str, list[tuple[Path, ManifestFile]]]:
    """List files of other entries of this URI.

    Those that did not change since are linked, not fetched.
    """
    found: dict[str, list[tuple[Path, ManifestFile]]] = {}
    for other in cache.entries():
        manifest = other.manifest() if other.folder != entry.folder else None
        if manifest is not None and manifest.uri == uri:
            for file in manifest.files:
                found.setdefault(file.name.removeprefix(prefix), []).append((other.files / file.name, file))
    return found

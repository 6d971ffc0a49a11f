"""Fetching of a listing into a folder.

Existing files are kept, the rest is transferred, all appears at once.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from awscrt.checksums import crc64nvme

from wmtp.errors import ConfigError, WMTPError
from wmtp.sizes import file_size
from wmtp.storage.base import Fetched
from wmtp.storage.lock import FileLock
from wmtp.storage.manifest import MANIFEST, Manifest, ManifestFile, hash_file
from wmtp_storage.journal import Journal, Kept, Segment, read_journal
from wmtp_storage.listing import STATE_FOLDER, Listing, list_objects
from wmtp_storage.progress import Progress
from wmtp_storage.transfer import Changed, Transfer
from wmtp_storage.work import Part

if TYPE_CHECKING:
    from wmtp_storage.backend import ObjectStorage, StoredObject
    from wmtp_storage.uris import RemoteURI

__all__ = ["Fetching", "fetch_into", "listings"]

logger = logging.getLogger("wmtp.storage")

#: how often a transfer begins anew because objects changed under it
_ROUNDS = 3
_BLOCK = 2**22  # bytes read at once
_READERS = 4  # threads that check existing files
_RESERVE = 2**24  # bytes of the disk that are left free


def listings(
    storage: ObjectStorage, uri: RemoteURI, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Iterator[Listing]:
    """List ``uri``, anew each time that a transfer found it changed.

    Raises:
        WMTPError: it keeps changing.
    """
    for number in range(_ROUNDS):
        if number:
            logger.warning("%s changed while it was fetched; continuing with its present content", uri)
        yield list_objects(storage, uri, include, exclude)
    raise WMTPError(f"{uri} keeps changing while it is fetched; wait until whoever writes to it has ended")


def fetch_into(storage: ObjectStorage, uri: RemoteURI, target: Path, include: Sequence[str], exclude: Sequence[str]) -> Fetched:
    """Fetch into a folder of the user's; see `wmtp.storage.Storage.fetch`."""
    began = time.monotonic()
    state = target / STATE_FOLDER
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a folder to fetch into")
    with _locked(target, state):
        manifest = Manifest.read(target / MANIFEST)
        known = {file.name: file for file in manifest.files} if manifest is not None else {}
        received = 0
        for listing in listings(storage, uri, include, exclude):
            fetching = Fetching(storage, uri, listing, target, state, known)
            is_there = fetching.transfer(include, exclude)
            received += fetching.received
            if is_there:
                files = fetching.commit(before=lambda: (target / MANIFEST).unlink(missing_ok=True))
                files += _still_there(target, manifest, uri, files, is_part=bool(include or exclude))
                Manifest(uri=str(uri), files=files).write(target / MANIFEST)
                shutil.rmtree(state, ignore_errors=True)
                return Fetched(
                    uri=str(uri),
                    target=target,
                    files=len(listing.objects),
                    checked=sum(file.checked is not None for file in files[: len(listing.objects)]),
                    size=listing.size,
                    transferred=received,
                    seconds=time.monotonic() - began,
                )
    raise AssertionError("listings() ends with an error")


def _still_there(
    target: Path, before: Manifest | None, uri: RemoteURI, files: tuple[ManifestFile, ...], *, is_part: bool
) -> tuple[ManifestFile, ...]:
    """List an earlier fetch's files that this one did not ask for.

    Those that the store no longer has are named in a warning.
    """
    if before is None or before.uri != str(uri):
        return ()
    names = {file.name for file in files}
    others = tuple(file for file in before.files if file.name not in names and (target / file.name).is_file())
    if is_part or not others:
        return others
    logger.warning("%s no longer has what stays in %s: %s", uri, target, ", ".join(file.name for file in others))
    return ()


@contextmanager
def _locked(target: Path, state: Path) -> Iterator[None]:
    """Lock the folder against other fetches.

    After a wait, the other's files are in place.
    """
    lock: FileLock | None = None
    try:
        while lock is None or not state.is_dir():  # the other removed the folder, and the lock with it
            state.mkdir(parents=True, exist_ok=True)
            lock = FileLock(state / "lock")
            lock.acquire(waiting_for=f"fetches into {target}")
    except FileNotFoundError:  # removed between two of our steps
        with _locked(target, state):
            yield
        return
    except OSError as error:
        raise WMTPError(f"{target} cannot be written to: {error.strerror}") from error
    with lock:
        yield


class Fetching:
    """One listing on its way to the disk.

    Args:
        storage: the backend.
        uri: what was listed.
        listing: the objects.
        folder: where the files will be.
        state: the folder with what a transfer has so far.
        known: manifest entries of files in ``folder``, by name.
        elsewhere: files on the same disk that were fetched from this URI before, by name, with their manifest entries.
    """

    def __init__(
        self,
        storage: ObjectStorage,
        uri: RemoteURI,
        listing: Listing,
        folder: Path,
        state: Path,
        known: Mapping[str, ManifestFile],
        elsewhere: Mapping[str, Sequence[tuple[Path, ManifestFile]]] | None = None,
    ) -> None:
        self.listing = listing
        self.received = 0
        self._storage, self._uri = storage, uri
        self._folder, self._state = folder, state
        self._known = known
        self._elsewhere = elsewhere or {}
        self._present: dict[str, ManifestFile] = {}
        self._parts: list[Part] = []

    def transfer(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> bool:
        """Have every file whole and verified.

        It is in its place then, or in the state folder.

        Args:
            include: as for the listing.
            exclude: as for the listing.

        Returns:
            whether all objects are still those of the listing; else nothing of it may be used together.

        Raises:
            WMTPError: it failed; what came is kept.
        """
        try:
            self._look()
            self._check_room()
            if not self._parts:
                return True
            journal = Journal(self._state / "journal", {part.stored.name: _kept(part) for part in self._parts})
        except OSError as error:
            raise WMTPError(f"{self._folder} cannot be written to: {error.strerror or error}") from error
        try:
            if not self._storage.gives_ranges(self._uri, [part.stored for part in self._parts]):
                for part in self._parts:
                    part.has_ranges = False
                    if part.missing:
                        part.segments.clear()
            with Progress(str(self._uri), self.listing, self._parts) as progress:
                transfer = Transfer(self._storage, self._uri, self._parts, journal, progress.show)
                try:
                    transfer.run()
                finally:
                    self.received += transfer.received
        except Changed as error:
            logger.debug("%s: %s was changed", self._uri, error)
            return False
        finally:
            journal.close()
        return list_objects(self._storage, self._uri, include, exclude).identity == self.listing.identity

    def commit(self, before: Callable[[], None] = lambda: None) -> tuple[ManifestFile, ...]:
        """Put all files into their places.

        Args:
            before: called when all is ready, before the first file appears.

        Returns:
            all files, by name.
        """
        try:
            before()
            for folder in {(self._folder / part.stored.name).parent for part in self._parts}:
                folder.mkdir(parents=True, exist_ok=True)
            for part in self._parts:
                part.path.replace(self._folder / part.stored.name)
        except OSError as error:
            raise WMTPError(f"{self._folder} could not be written: {error.strerror or error}") from error
        files = self._present | {part.stored.name: _manifest_file(part) for part in self._parts}
        return tuple(files[stored.name] for stored in self.listing.objects)

    def _look(self) -> None:
        """Find existing files by manifest, and existing ranges by journal."""
        journal = read_journal(self._state / "journal")
        self._check_places()
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            for stored, found in zip(
                self.listing.objects, pool.map(lambda stored: self._here(stored, journal), self.listing.objects), strict=True
            ):
                if isinstance(found, Part):
                    self._parts.append(found)
                else:
                    self._present[stored.name] = found

    def _here(self, stored: StoredObject, journal: Mapping[str, Kept]) -> ManifestFile | Part:
        """Return a file in its place, or a part to fetch.

        The file is whole and of this version; the part has what of it is on the disk.
        """
        known = self._known.get(stored.name)
        path = self._folder / stored.name
        if known is not None and _is_of(known, stored) and _has_hash(path, known):
            return known
        part = Part(stored, self._state / "files" / stored.name)
        kept = journal.get(stored.name)
        if kept is not None and (kept.size, kept.identity) == (stored.size, stored.identity):
            part.segments = _written(part.path, kept.segments)
            if not part.segments and kept.segments and not part.path.exists():
                # a kill while the files were put into their places: this one is there already
                whole = _written(path, kept.segments)
                if sum(segment.end - segment.start for segment in whole) == stored.size == file_size(path):
                    part.path.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(part.path)
                    part.segments = whole
        for other, manifest_file in self._elsewhere.get(stored.name, ()) if part.missing and not part.segments else ():
            if _is_of(manifest_file, stored) and _has_hash(other, manifest_file):
                part.path.parent.mkdir(parents=True, exist_ok=True)
                part.path.unlink(missing_ok=True)
                os.link(other, part.path)
                part.segments = [Segment(0, stored.size, int(manifest_file.hash.partition(":")[2], 16))]
                break
        return part

    def _check_places(self) -> None:
        """Refuse a folder in a file's place, or the other way round."""
        for name in sorted({parent for stored in self.listing.objects for parent in PurePosixPath(stored.name).parents}):
            path = self._folder / name
            if path.exists() and not path.is_dir():
                raise ConfigError(
                    f"{path} is a file, but {self._uri} has a folder of this name; remove it, or choose another folder"
                )
        if (self._state.parent / self._state.name.upper()).exists():  # a disk to which large and small letters are the same
            alike: dict[str, str] = {}
            for stored in self.listing.objects:
                other = alike.setdefault(unicodedata.normalize("NFC", stored.name).casefold(), stored.name)
                if other != stored.name:
                    raise ConfigError(
                        f"{self._uri} has {other!r} and {stored.name!r}, which are the same name on the disk of {self._folder};"
                        " leave one out with --exclude, or choose a folder on another disk"
                    )
        for stored in self.listing.objects:
            path = self._folder / stored.name
            if path.is_dir():
                raise ConfigError(
                    f"{path} is a folder, but {self._uri} has a file of this name; remove it, or choose another folder"
                )

    def _check_room(self) -> None:
        """Refuse a transfer that does not fit on the disk."""
        needed = sum(part.stored.size - _allocated(part.path) for part in self._parts)
        folder = self._folder
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > 0 and needed + _RESERVE > free:
            raise WMTPError(
                f"{self._uri} does not fit: it needs {needed / 1e9:.2f} GB more, but on the disk of {self._folder} only"
                f" {free / 1e9:.2f} GB are free"
            )


def _is_of(known: ManifestFile, stored: StoredObject) -> bool:
    """Tell whether a fetched file is of this version of an object."""
    return (known.size, known.etag) == (stored.size, stored.identity) and known.hash.startswith("crc64nvme:")


def _kept(part: Part) -> Kept:
    return Kept(part.stored.size, part.stored.identity, part.segments)


def _manifest_file(part: Part) -> ManifestFile:
    assert part.hash is not None, "a part is hashed before it is listed"
    stored = part.stored
    return ManifestFile(
        name=stored.name, size=stored.size, etag=stored.identity, hash=f"crc64nvme:{part.hash:016x}", checked=part.checked
    )


def _has_hash(path: Path, known: ManifestFile) -> bool:
    try:
        return path.stat().st_size == known.size and hash_file(path, known.hash.partition(":")[0]) == known.hash
    except OSError:
        return False


def _written(path: Path, segments: list[Segment]) -> list[Segment]:
    """Select the segments whose bytes are on the disk.

    After a loss of power they may not be.
    """
    good: list[Segment] = []
    buffer = memoryview(bytearray(_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            for segment in sorted(segments, key=lambda segment: segment.start):
                if good and segment.start < good[-1].end:
                    continue  # fetched twice
                crc, position = 0, segment.start
                file.seek(position)
                while position < segment.end:
                    count = file.readinto(buffer[: min(_BLOCK, segment.end - position)]) or 0
                    if not count:
                        break
                    crc, position = crc64nvme(buffer[:count], crc), position + count  # type: ignore[arg-type]
                if position == segment.end and crc == segment.crc:
                    good.append(segment)
    except OSError:
        pass
    return good


def _allocated(path: Path) -> int:
    """Bytes of the disk that a partial file has already."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0

"""Atomic upload of a file or a folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from attrs import frozen

from wmtp.errors import WMTPError
from wmtp.storage.walk import files_below
from wmtp_storage.aio import Budget, run, together
from wmtp_storage.arrival import Uploaded, check_arrived
from wmtp_storage.failures import WrongAnswerError, explained
from wmtp_storage.leftovers import INCOMPLETE, REPLACING, remove, staging_folders
from wmtp_storage.push_lock import OLD, locked_push
from wmtp_storage.retrying import Retries, is_transient, with_retries

if TYPE_CHECKING:
    from obstore import PutResult

    from wmtp_storage.backend import ObjectStorage
    from wmtp_storage.uris import RemoteURI

__all__ = ["push"]

_NEW = b"This folder is being written, or was left half-written.\n"
_PART = 8 * 2**20
_GRACE = 5.0  # seconds
#: S3 copies no larger objects in one request
_LARGEST_COPY = 5 * 10**9


@frozen
class _File:
    path: Path
    name: str
    size: int


def push(storage: ObjectStorage, path: Path, uri: RemoteURI) -> None:
    """Upload ``path``; see `wmtp.storage.Storage.push`.

    A file is one object, which appears whole. A new folder has the object `INCOMPLETE` in it until it is whole. The files of a
    folder that is there already are uploaded beside it, and copied into it by the store once all of them are up.

    Raises:
        WMTPError: it could not be uploaded; the message says what is at ``uri`` now.
    """
    what = f"{path} cannot be uploaded to {uri}:"
    if not uri.key and not path.is_dir():
        raise WMTPError(f"{what} write the file's name too: {uri.at(path.name)}")
    files = _local_files(path, what)
    if path.is_dir() and storage.head(uri) is not None:
        raise WMTPError(f"{what} an object is there; remove it, or write another name")
    if not path.is_dir() and next(storage.objects(uri), None) is not None:
        raise WMTPError(f"{what} a folder is there; write the file's name too: {uri.at(path.name)}")
    with locked_push(storage, uri) as staging:
        if path.is_dir():
            _push_folder(storage, files, uri, staging)
        else:
            _upload(storage, files, uri, f"{uri} is as it was")


def _local_files(path: Path, what: str) -> list[_File]:
    """List the files to upload, after checking that all are readable."""
    if not path.exists():
        raise WMTPError(f"{what} {path} does not exist")
    found = [path]
    if path.is_dir():
        found = sorted(files_below(path))
    files = []
    for file in found:
        if not file.is_file():
            raise WMTPError(f"{what} {file} is {'a link to nothing' if file.is_symlink() else 'no file'}")
        try:
            with file.open("rb"):
                files.append(_File(file, file.relative_to(path).as_posix() if file != path else "", file.stat().st_size))
        except OSError as error:
            raise WMTPError(f"{what} {file}: {error.strerror}") from error
    if not files:
        raise WMTPError(f"{what} it holds no files, and an object store keeps no empty folders")
    return files


def _push_folder(storage: ObjectStorage, files: list[_File], uri: RemoteURI, staging: RemoteURI) -> None:
    there = {found.key for found in storage.objects(uri)}
    marker = uri.at(INCOMPLETE).key
    wanted = {uri.at(file.name).key for file in files}
    if not there:
        put_marker(storage, uri, _NEW)
        try:
            _upload(storage, files, uri, f"nothing is at {uri}")
        except BaseException:
            remove(storage, uri, wanted)
            if all(found.key == marker for found in storage.objects(uri)):  # else the mark says that it must not be read
                remove(storage, uri, [marker])
            raise
        remove(storage, uri, [marker])
        return
    for left in staging_folders(storage, uri):
        if time.time() - max((found.modified.timestamp() for found in left), default=0.0) > OLD:
            remove(storage, uri, [found.key for found in left])
    copied = [file for file in files if file.size <= _LARGEST_COPY]
    try:
        _upload(storage, copied, staging, f"{uri} is as it was")
        put_marker(storage, uri, REPLACING)
        half = f"{uri} is half replaced, and will not be read: upload it again"
        with _said(half):
            run(_copy(storage, copied, staging, uri))
            check_arrived(storage, uri, {file.name: Uploaded(file.size) for file in copied})
        _upload(storage, [file for file in files if file.size > _LARGEST_COPY], uri, half)
        remove(storage, uri, [*(there - wanted - {marker}), marker])
    finally:
        remove(storage, staging, [staging.at(file.name).key for file in copied])


@contextmanager
def _said(state: str) -> Iterator[None]:
    """Have an error say what is at the URI now."""
    try:
        yield
    except WMTPError as error:
        raise WMTPError(f"{error}; {state}") from error


def put_marker(storage: ObjectStorage, uri: RemoteURI, text: bytes) -> None:
    """Say that the folder must not be read."""
    place = uri.at(INCOMPLETE)
    try:
        with_retries(storage.config.retry_timeout, uri, lambda: obstore.put(storage.opened(uri).store, place.key, text))
    except (obstore.exceptions.BaseError, OSError) as error:
        raise explained(error, uri, "written") from error
    check_arrived(storage, place, {"": Uploaded(len(text))})


def _upload(storage: ObjectStorage, files: list[_File], to: RemoteURI, state: str) -> None:
    """Upload files side by side, and see that they are there.

    Large ones go in parts, within the bounds of the config.

    Args:
        storage: the backend.
        files: what to upload.
        to: the folder; of a single file its own URI.
        state: what is at the place afterwards if it fails.
    """
    config, store = storage.config, storage.opened(to).uploader
    parts = max(2, min(config.max_connections, config.max_memory * 2**20 // _PART))
    room = Budget(parts)
    uploaded: dict[str, Uploaded] = {}

    async def one(file: _File) -> None:
        # a large file takes half of the room: two of them keep the line busy while one ends
        share = max(1, min(parts // 2, -(-file.size // _PART)))
        async with room.share(share):
            retries = Retries(config.retry_timeout, to.at(file.name))
            while True:  # the whole file once more: its object appears at the end of an upload, or not at all
                try:
                    put = obstore.put_async(store, to.at(file.name).key, file.path, chunk_size=_PART, max_concurrency=share)
                    uploaded[file.name] = Uploaded(file.size, (await _whole(put))["e_tag"])
                    return
                except (obstore.exceptions.BaseError, OSError) as error:
                    pause = retries.pause(error) if is_transient(error) else None
                    if pause is None:
                        raise explained(error, f"{file.path} to {to.at(file.name)}", "uploaded") from error
                await asyncio.sleep(pause)

    with _said(state):
        run(together(one(file) for file in sorted(files, key=lambda file: file.size)))
        check_arrived(storage, to, uploaded)


async def _whole(put: Awaitable[PutResult]) -> PutResult:
    """Wait for an upload, and give a cancelled one time to end.

    A request that is on its way already may still be done by the store, later than whatever removes the object again.
    """
    upload = asyncio.ensure_future(put)
    try:
        return await asyncio.shield(upload)
    except asyncio.CancelledError:
        await asyncio.wait([upload], timeout=_GRACE)
        upload.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # its outcome no longer matters
        upload.cancel()
        raise


async def _copy(storage: ObjectStorage, files: list[_File], staging: RemoteURI, uri: RemoteURI) -> None:
    copy, room = storage.opened(uri).copy, Budget(storage.config.max_connections)

    async def one(file: _File) -> None:
        async with room.share(1):
            try:
                await asyncio.to_thread(copy, staging.at(file.name).key, uri.at(file.name).key)
            except (obstore.exceptions.BaseError, OSError, WrongAnswerError) as error:
                raise explained(error, uri.at(file.name), "replaced") from error

    await together(one(file) for file in files)

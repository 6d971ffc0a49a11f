"""One upload to a place at a time from this machine.

The next one removes what a killed one left. The system frees the lock of a killed process, and its note stays: who gets the
lock and finds a note knows that nobody is still at work on what it names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from wmtp.errors import WMTPError
from wmtp.json_files import DAMAGE
from wmtp.storage.lock import FileLock
from wmtp_storage.leftovers import is_at, remove

if TYPE_CHECKING:
    from wmtp_storage.backend import ObjectStorage
    from wmtp_storage.uris import RemoteURI

__all__ = ["OLD", "locked_push"]

logger = logging.getLogger("wmtp.storage")

#: seconds after which nobody is still writing: an upload of parts of 8 MiB ends sooner on any line that is of use
OLD = 24 * 3600.0
_CLOCKS = 600.0  # seconds that this machine's clock and the store's may differ by


@frozen
class _Note:
    """Record of an upload under way.

    Args:
        staging: the key of the folder beside the target that it may write.
        began: when, by this machine's clock.
    """

    staging: str
    began: float


@contextmanager
def locked_push(storage: ObjectStorage, uri: RemoteURI) -> Iterator[RemoteURI]:
    """Wait for other uploads to ``uri``, and clean up after killed ones.

    Others are processes of this user on this machine.

    Yields:
        the folder to upload to beside ``uri``, should that have to be replaced.
    """
    note = _Note(f"{uri.key}.partial-{secrets.token_hex(8)}", time.time())
    staging = evolve(uri, key=note.staging, is_folder=False)
    try:
        file = _folder() / hashlib.sha256(f"{_endpoint(storage)} {uri}".encode()).hexdigest()[:32]
        lock = FileLock(file)
        lock.acquire(waiting_for=f"uploads to {uri}")
    except OSError as error:
        logger.warning("%s: should this upload be killed, the next will not remove what it leaves: %s", uri, error)
        yield staging
        return
    with lock:
        left = _read(file)
        for killed in tuple(left):
            if _removed(storage, uri, killed):
                left.remove(killed)
        file.write_text("".join(f"{json.dumps([each.staging, each.began])}\n" for each in (*left, note)))
        yield staging
        if left:
            file.write_text("".join(f"{json.dumps([each.staging, each.began])}\n" for each in left))
        else:
            lock.remove()


def _endpoint(storage: ObjectStorage) -> str:
    """Tell servers apart that have buckets of one name."""
    variables = [os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "GOOGLE_BASE_URL")]
    return next(filter(None, (getattr(storage.config, "endpoint", None), *variables)), "")


def _folder() -> Path:
    """Folder of this user's locks and notes.

    Raises:
        OSError: it cannot be made, or is somebody else's.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir(), f"wmtp-uploads-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or (user and facts.st_uid != user):
        raise OSError(f"{folder} is not this user's folder")
    return folder


def _read(file: Path) -> list[_Note]:
    notes = []
    for line in file.read_text().splitlines():
        try:
            staging, began = json.loads(line)
            notes.append(_Note(str(staging), float(began)))
        except DAMAGE:  # cut off by the kill: its upload had not begun
            continue
    return notes


def _removed(storage: ObjectStorage, uri: RemoteURI, killed: _Note) -> bool:
    """Remove what a killed upload left beside ``uri``, and its parts.

    The next upload replaces the rest.
    """
    try:
        opened = storage.opened(uri)
        remove(storage, uri, [found.key for found in storage.objects(evolve(uri, key=killed.staging, is_folder=False))])
        mine = [
            each
            for each in opened.unfinished(uri.key)
            if is_at(each.key, uri.key) and each.began.timestamp() > killed.began - _CLOCKS
        ]
        opened.abort(mine)
    except WMTPError as error:
        logger.warning("%s: what a killed upload left there stays: %s", uri, error)
        return False
    return True

"""Storage backend for this machine's files."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from wmtp.errors import FileError, WMTPError
from wmtp.storage.atomic import replace_path
from wmtp.storage.base import Leftover, Storage, StoredFile
from wmtp.storage.hub.names import cached_snapshot
from wmtp.storage.lock import FileLock
from wmtp.storage.uris import file_path
from wmtp.storage.walk import files_below, not_there, special_kind

__all__ = ["File"]

_PARTIAL = ".part"
_LONGEST = 100  # characters of a target's name in that of the folder beside it
_LOCK = "lock"
_YOUNG = 60.0  # seconds


class File(Storage):
    """Local files and folders. Nothing is fetched: `localize` gives the path itself."""

    def exists(self, uri: str) -> bool:
        """Return True if a readable file or folder is there."""
        path = file_path(uri)
        if path.is_dir():
            return os.access(path, os.R_OK | os.X_OK)
        return path.is_file() and os.access(path, os.R_OK)

    def localize(self, uri: str, cache_dir: Path) -> Path:
        """Return the path itself; see `Storage.localize`.

        Of a folder of the hub's cache, that of its files.
        """
        path = file_path(uri)
        if self.exists(uri):
            return cached_snapshot(path)
        if path.exists():
            raise FileError(not_there(path) if special_kind(path) else f"{uri}: it may not be read ({path})")
        there = next(parent for parent in path.parents if parent.exists())
        raise FileError(f"{uri}: no such file or folder; {path} was looked for, and of that {there} exists")

    def push(self, path: Path, uri: str) -> None:
        """Copy beside the target, then rename; see `Storage.push`.

        A file replaces a file, a folder a whole folder. Links in the source are followed. A folder is replaced by two renames:
        between them, for an instant, there is none.
        """
        # a link in the target's place is kept, and its target is replaced
        source, target = path.resolve(), file_path(uri).resolve()
        _check_push(path, uri, source, target)
        if source == target:
            return
        staging = None
        lock = ExitStack()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for left in _left_beside(target):
                _remove_left(left)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name[:_LONGEST]}.", suffix=_PARTIAL, dir=target.parent))
            lock.enter_context(_held(staging))
            _copy(source, staging / "new")
            replace_path(staging / "new", target, staging / "old")
        except OSError as error:
            reason = error.strerror or str(error)
            raise WMTPError(f"{path} could not be copied to {uri}: {reason}; {target} is as it was") from error
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            lock.close()

    def files(self, uri: str) -> Iterator[StoredFile]:
        """See `Storage.files`. What a killed `push` left is not among them."""
        path = file_path(uri)
        found = [path] if path.is_file() else sorted(file for file in files_below(path) if file.is_file())
        for file in found:
            inside = file.relative_to(path)
            if not any(part.startswith(".") and part.endswith(_PARTIAL) for part in inside.parts):
                facts = file.stat()
                identity = f"{facts.st_ino}-{facts.st_mtime_ns}-{facts.st_size}"
                yield StoredFile(name=inside.as_posix() if file != path else path.name, size=facts.st_size, identity=identity)

    def remove(self, uri: str) -> None:
        """See `Storage.remove`."""
        path = file_path(uri)
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise WMTPError(f"{uri} could not be removed: {error.strerror}") from error

    def tidy(self, uri: str) -> None:
        """See `Storage.tidy`."""
        folder = file_path(uri)
        for path in folder.glob(f".*{_PARTIAL}") if folder.is_dir() else ():
            if _is_staging(path):
                _remove_left(path)

    def clean(self, uri: str, *, older_than: float, dry_run: bool = False) -> Sequence[Leftover]:
        """See `Storage.clean`. What a process is writing is locked, and stays."""
        place, found = file_path(uri), []
        inside = place.rglob(f".*{_PARTIAL}") if place.is_dir() else ()
        for path in (*_left_beside(place), *(path for path in inside if _is_staging(path) and not _is_held(path))):
            files = [file.stat() for file in path.rglob("*") if file.is_file()]
            age = time.time() - max(path.stat().st_mtime, *(facts.st_mtime for facts in files), 0.0)
            if age >= older_than:
                size = sum(facts.st_size for facts in files)
                found.append(Leftover(uri=str(path), kind="copy that was not ended", size=size, age=age))
                if not dry_run:
                    _remove_left(path)
        return found


def _is_staging(path: Path) -> bool:
    """Tell whether a folder is one that `File.push` made.

    Somebody else's may have a name like it.
    """
    try:
        return not path.is_symlink() and {each.name for each in path.iterdir()} <= {_LOCK, "new", "old"}
    except OSError:  # no folder, or removed by its owner just now
        return False


@contextmanager
def _held(staging: Path) -> Iterator[None]:
    """Lock a folder that this process works in.

    The system frees the lock when the process ends or is killed.
    """
    lock = FileLock(staging / _LOCK)
    lock.acquire()
    with lock:
        yield


def _is_held(staging: Path) -> bool:
    """Tell whether the process that made a folder still works.

    A folder without a lock yet is new, or older than locks.
    """
    try:
        if not (staging / _LOCK).exists():
            return time.time() - staging.stat().st_mtime < _YOUNG
        with FileLock(staging / _LOCK) as lock:
            return not lock.acquire(wait=False)
    except OSError:  # removed by its owner just now
        return True


def _left_beside(target: Path) -> list[Path]:
    """List the folders that killed copies to ``target`` left beside it."""
    name = re.compile(rf"\.{re.escape(target.name[:_LONGEST])}\.[a-z0-9_]{{8}}{re.escape(_PARTIAL)}")
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return [path for path in beside if name.fullmatch(path.name) and _is_staging(path) and not _is_held(path)]


def _remove_left(staging: Path) -> None:
    """Remove a folder of a killed copy.

    A copy that was killed between its two renames has what the target was: that goes back.
    """
    name = staging.name[1 : -len(_PARTIAL) - 9]
    target, old = staging.parent / name, staging / "old"
    if old.exists() and not target.exists():
        if len(name) == _LONGEST:  # the target's whole name is not known
            return
        old.rename(target)
    shutil.rmtree(staging, ignore_errors=True)


def _check_push(path: Path, uri: str, source: Path, target: Path) -> None:
    what = f"{path} cannot be copied to {uri}:"
    if not source.exists():
        raise WMTPError(f"{what} {path} does not exist")
    if source == target:
        return
    if target.is_dir() and not source.is_dir():
        raise WMTPError(f"{what} a folder is there; write the file's name too: {uri.rstrip('/')}/{path.name}")
    if source.is_dir() and target.exists() and not target.is_dir():
        raise WMTPError(f"{what} a file is there; remove it, or write another name")
    if target.is_relative_to(source):
        raise WMTPError(f"{what} a folder cannot be copied into itself")
    # the target is replaced whole: a user who names one of these means a folder inside it
    for kept in (source, Path.cwd(), Path.home().resolve()):
        if kept.is_relative_to(target):
            raise WMTPError(f"{what} it would replace {target}, which holds {kept}; write a new folder's name")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for entry in sorted(source.iterdir()):
            _copy(entry, target / entry.name)
        return
    shutil.copyfile(source, target)
    # some file systems report a full disk only here
    with target.open("rb+") as file:
        os.fsync(file.fileno())

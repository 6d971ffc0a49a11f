"""Storage backend for this machine's files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wmtp.errors import WMTPError
from wmtp.storage.atomic import replace_path
from wmtp.storage.base import Storage, StoredFile
from wmtp.storage.hub.names import cached_snapshot
from wmtp.storage.uris import file_path

__all__ = ["File"]

_PARTIAL = ".part"


class File(Storage):
    """Local files and folders. Nothing is fetched: `localize` gives the path itself."""

    def exists(self, uri: str) -> bool:
        """Return True if a readable file or folder is there."""
        path = file_path(uri)
        if path.is_dir():
            return os.access(path, os.R_OK | os.X_OK)
        return path.is_file() and os.access(path, os.R_OK)

    def localize(self, uri: str, cache_dir: Path) -> Path:
        """Return the path, of a folder of the hub's cache its files; see `Storage.localize`."""
        path = file_path(uri)
        if self.exists(uri):
            return cached_snapshot(path)
        if path.exists():
            kind = "it may not be read" if path.is_file() or path.is_dir() else "it is neither a file nor a folder"
            raise WMTPError(f"{uri}: {kind} ({path})")
        there = next(parent for parent in path.parents if parent.exists())
        raise WMTPError(f"{uri}: no such file or folder; {path} was looked for, and of that {there} exists")

    def push(self, path: Path, uri: str) -> None:
        """Copy a file or folder beside its target, then rename it; see `Storage.push`.

        A file replaces a file, a folder a whole folder. Links in the source are followed. A folder is replaced by two renames:
        between them, for an instant, there is none.
        """
        # a link in the target's place is kept, and its target is replaced
        source, target = path.resolve(), file_path(uri).resolve()
        _check_push(path, uri, source, target)
        if source == target:
            return
        staging = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=_PARTIAL, dir=target.parent))
            _copy(source, staging / "new")
            replace_path(staging / "new", target, staging / "old")
        except OSError as error:
            reason = error.strerror or str(error)
            raise WMTPError(f"{path} could not be copied to {uri}: {reason}; {target} is as it was") from error
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)

    def files(self, uri: str) -> Iterator[StoredFile]:
        """See `Storage.files`. What a killed `push` left is not among them."""
        path = file_path(uri)
        found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
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
            shutil.rmtree(path, ignore_errors=True)


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

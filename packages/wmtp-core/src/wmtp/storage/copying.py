"""`Storage.fetch` for backends that have none of their own."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from wmtp.errors import ConfigError, FileError, WMTPError
from wmtp.redaction import redact
from wmtp.storage.base import Fetched, Storage
from wmtp.storage.manifest import MANIFEST, Manifest, ManifestFile, hash_file
from wmtp.storage.walk import files_below

__all__ = ["copy_into", "is_wanted"]


def is_wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Match a file's path or its name against the patterns."""

    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern) or fnmatchcase(PurePosixPath(name).name, pattern) for pattern in patterns)

    return (not include or matches(include)) and not matches(exclude)


def copy_into(storage: Storage, uri: str, target: Path, include: Sequence[str], exclude: Sequence[str]) -> Fetched:
    """Copy what ``storage.localize`` gives; see `Storage.fetch`."""
    began = time.monotonic()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a folder to fetch into")
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".wmtp-", suffix=".part", dir=target))
    except OSError as error:
        raise WMTPError(f"{target} cannot be written to: {error.strerror}") from error
    try:
        source = storage.localize(uri, staging / "cache")
        names = [source.name] if source.is_file() else sorted(_names(source))
        names = [name for name in names if is_wanted(name, include, exclude)]
        if not names:
            raise FileError(f"{redact(uri)}: nothing there {'matches the patterns' if include or exclude else 'is a file'}")
        files = [_copy(source.parent if source.is_file() else source, name, staging / "new") for name in names]
        manifest = Manifest(uri=redact(uri), files=tuple(files))
        (target / MANIFEST).unlink(missing_ok=True)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / "new" / name).replace(target / name)
        manifest.write(target / MANIFEST)
    except OSError as error:
        place = error.filename2 or error.filename or target  # a folder that is in the way, for one
        raise WMTPError(f"{redact(uri)} could not be copied to {target}: {place}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    seconds = time.monotonic() - began
    return Fetched(
        uri=redact(uri), target=target, files=len(files), size=manifest.size, transferred=manifest.size, seconds=seconds
    )


def _names(folder: Path) -> Iterable[str]:
    for path in files_below(folder):
        if path.is_symlink() and not path.exists():
            raise WMTPError(f"{folder} cannot be copied: {path} is a link to what does not exist")
        if path.is_file() and path != folder / MANIFEST:
            yield path.relative_to(folder).as_posix()


def _copy(source: Path, name: str, target: Path) -> ManifestFile:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target / name)
    return ManifestFile(name=name, size=(target / name).stat().st_size, hash=hash_file(target / name, "sha256"))

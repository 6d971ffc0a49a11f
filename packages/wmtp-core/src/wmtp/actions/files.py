"""Move files between this machine and stores, for every storage backend."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from wmtp.config.load import ConfigSource, load_storage
from wmtp.config.overrides import parse_override
from wmtp.config.places import build_backends
from wmtp.errors import ConfigError, FileError
from wmtp.public import public
from wmtp.redaction import redact
from wmtp.runs.directory import is_run_dir
from wmtp.storage.base import Fetched, Leftover, Storage
from wmtp.storage.cache import Cache
from wmtp.storage.hub.names import unclear_target
from wmtp.storage.manifest import MANIFEST, Manifest
from wmtp.storage.manifest import verify as verify_files
from wmtp.storage.uris import backend_for, local_path, scheme_of
from wmtp.storage.walk import not_there, special_kind

if TYPE_CHECKING:
    from wmtp.config.schema import StorageConfig
    from wmtp.tracking.pull import Pulled

__all__ = ["Pushed", "Verified", "cache", "clean", "fetch", "pull_runs", "push", "storage_section", "verify"]


@frozen(kw_only=True)
class Pushed:
    """Result of `push`.

    Args:
        path: the local file or folder.
        uri: where it is now, without anything secret.
        seconds: of copying.
    """

    path: Path
    uri: str
    seconds: float


@frozen(kw_only=True)
class Verified:
    """Result of `verify`.

    Args:
        target: the folder.
        uri: the URI it was fetched from.
        files: their number.
        size: their bytes.
        problems: a line for each file that is not as it was fetched.
    """

    target: Path
    uri: str
    files: int
    size: int
    problems: Sequence[str]


@public
def fetch(
    uri: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Fetched:
    """Fetch a file or folder, whole, as ``wmtp fetch`` does.

    Contents are compared with the store's checksums where it has any (``checked`` says how many). What broke off before is
    continued.

    Args:
        uri: a URI or a path.
        folder: made if it is not there.
        include: patterns, as ``*.safetensors``; files whose name matches none are left out.
        exclude: patterns; files whose name matches one are left out.
        config: a TOML file or mapping, or several, whose ``[storage]`` says how to reach the store of the URI.
        overrides: ``KEY=VALUE`` texts laid over those.

    Raises:
        ConfigError: the URI is wrong, or no installed plugin serves its scheme.
        WMTPError: nothing is there, or it could not be read or written.
    """
    target = local_path(folder)
    return _backend(uri, config, overrides).fetch(os.fspath(uri), target, include=include, exclude=exclude)


@public
def verify(folder: str | os.PathLike[str], uri: str | None = None) -> Verified:
    """Verify fetched files in a folder, as ``wmtp fetch --verify`` does.

    Args:
        folder: with files that were fetched.
        uri: refuse a folder that was fetched from elsewhere.

    Raises:
        WMTPError: nothing was fetched into it, or from another URI.
    """
    target = local_path(folder)
    manifest = Manifest.read(target / MANIFEST)
    if manifest is None:
        raise FileError(f"{target}: there is no {MANIFEST}, so it is not known what should be there; fetch into it")
    wanted = None if uri is None else redact(uri).partition("?")[0].rstrip("/")
    if wanted is not None and wanted != manifest.uri.rstrip("/"):
        raise ConfigError(f"{target} was fetched from {manifest.uri}, not from {wanted}")
    problems = verify_files(target, manifest.files)
    return Verified(target=target, uri=manifest.uri, files=len(manifest.files), size=manifest.size, problems=problems)


@public
def push(
    path: str | os.PathLike[str],
    uri: str | os.PathLike[str],
    *,
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Pushed:
    """Copy a local file or folder to a URI, as ``wmtp push``.

    Arguments and errors: see `fetch`. To the Hugging Face hub a run directory gives its model, with a model card.
    """
    began = time.monotonic()
    source = local_path(path)
    if not source.exists() or special_kind(source):
        raise FileError(not_there(source))
    run_dir = source.parent if source.name == "model" and is_run_dir(source.parent) else source
    if scheme_of(os.fspath(uri)) == "hf" and is_run_dir(run_dir):
        from wmtp.exporting.pushing import push_run

        push_run(run_dir, os.fspath(uri), storage_section(config, overrides))
    else:
        target = os.fspath(uri)
        if problem := unclear_target(target):
            raise ConfigError(problem)
        _backend(uri, config, overrides).push(source, target)
    return Pushed(path=source, uri=redact(os.fspath(uri)), seconds=time.monotonic() - began)


@public
def clean(
    uri: str | os.PathLike[str],
    *,
    older_than: float = 24 * 3600.0,
    dry_run: bool = False,
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Sequence[Leftover]:
    """Remove leftovers of killed uploads at a URI, as ``wmtp clean``.

    Inside it and beside it.

    Args:
        uri: a URI or a path.
        older_than: seconds since something was added to it: uploads under way stay.
        dry_run: only find it.
        config: as for `fetch`.
        overrides: ``KEY=VALUE`` texts laid over those.

    Raises:
        ConfigError: the URI is wrong, or no installed plugin serves its scheme.
        WMTPError: the store could not be asked, or something could not be removed.
    """
    return _backend(uri, config, overrides).clean(os.fspath(uri), older_than=older_than, dry_run=dry_run)


@public
def cache(
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Cache:
    """Open the cache of fetched files.

    ``list()``, ``verify()`` and ``prune(max_size)`` do what ``wmtp cache`` does.

    Args:
        cache_dir: its folder. Default: ``storage.cache_dir``.
        config: as for `fetch`.
        overrides: ``KEY=VALUE`` texts laid over those.
    """
    folder = local_path(cache_dir or storage_section(config, overrides).cache_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name the cache's folder")
    return Cache(folder)


@public
def pull_runs(
    uri: str,
    into: str | os.PathLike[str] = "runs/mlflow.db",
    *,
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Pulled:
    """Merge runs into one database, as ``wmtp runs pull URI`` does.

    They come from an object store.

    Args:
        uri: what was ``tracker.tracking_uri``.
        into: the SQLite database.
        config: as for `fetch`.
        overrides: ``KEY=VALUE`` texts laid over those.

    Raises:
        ConfigError: the URI is wrong, or no installed plugin serves its scheme.
        WMTPError: there are no runs, or one cannot be read; those before it are merged.
    """
    from wmtp.tracking.pull import pull

    return pull(_backend(uri, config, overrides), uri, local_path(into))


def storage_section(config: ConfigSource | Sequence[ConfigSource], overrides: Iterable[str]) -> StorageConfig:
    """Read ``[storage]`` for work that has no config of its own.

    Args:
        config: a TOML file or mapping, or several.
        overrides: ``KEY=VALUE`` texts laid over those.

    Raises:
        ConfigError: the section is wrong, or an override gives a key of another one, which would have no effect.
    """
    texts = list(overrides)
    given = [parse_override(text) for text in texts]
    if others := [override for override in given if override.path[0] != "storage"]:
        reason = "there is no config here, and keys of storage alone are taken; remove it"
        raise ConfigError([f"{override.where(())}: {reason}" for override in others])
    return load_storage(config, texts)


def _backend(uri: str | os.PathLike[str], config: ConfigSource | Sequence[ConfigSource], overrides: Iterable[str]) -> Storage:
    return backend_for(os.fspath(uri), build_backends(storage_section(config, overrides)))

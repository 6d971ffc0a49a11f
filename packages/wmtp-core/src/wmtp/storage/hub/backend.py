"""Storage backend for the Hugging Face hub: huggingface_hub's downloads and its cache."""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from attrs import evolve
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download

from wmtp.errors import ConfigError, WMTPError
from wmtp.sizes import format_bytes
from wmtp.storage.base import Storage, StoredFile
from wmtp.storage.hub.cache import (
    KINDS,
    cached_commit,
    cached_files,
    is_whole,
    note_revision,
    snapshot_of,
    write_note,
)
from wmtp.storage.hub.choose import chosen_files
from wmtp.storage.hub.failures import explained, is_offline, is_unreachable, patiently
from wmtp.storage.hub.names import HubName, parse_hub_uri
from wmtp.storage.walk import files_below, is_hidden

__all__ = ["Hub"]

logger = logging.getLogger("wmtp")


class Hub(Storage):
    """Models and data sets of the hub, in huggingface_hub's own cache.

    Endpoint, cache, offline mode and token are what huggingface_hub reads: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_CACHE``,
    ``HF_HUB_OFFLINE``, ``HF_TOKEN`` or the file that ``hf auth login`` writes.

    Args:
        private: whether a repository that `push` makes is private.
    """

    def __init__(self, *, private: bool = True) -> None:
        self._private = private
        self._api = HfApi(library_name="wmtp")
        self._listed: dict[str, Mapping[str, StoredFile]] = {}

    def exists(self, uri: str) -> bool:
        """Tell whether the hub has the path, at the revision."""
        name = parse_hub_uri(uri)
        try:
            return bool(chosen_files(name, self._list(self._pinned(name))))
        except ConfigError:
            return False

    def pinned(self, uri: str) -> str:
        """Name the commit that the revision is now; see `Storage.pinned`."""
        return self._pinned(parse_hub_uri(uri)).uri

    def localize(self, uri: str, cache_dir: Path) -> Path:
        """Fetch into huggingface_hub's cache what is not there yet; see `Storage.localize`.

        What was found whole once is used again without asking the hub. ``cache_dir`` is not used.
        """
        given = parse_hub_uri(uri)
        name = self._pinned(given)
        snapshot = snapshot_of(name)
        if not is_whole(name):
            try:
                there = self._list(name)
            except WMTPError as error:
                if not is_unreachable(error.__cause__) and not is_offline(error.__cause__):
                    raise
                return self._only_cached(name, snapshot, error)
            self._fetch(name, {file: there[file].size for file in chosen_files(given, there)})
        return snapshot / name.path if name.path else snapshot

    def files(self, uri: str) -> Iterator[StoredFile]:
        """Yield a repository's files; see `Storage.files`.

        Of a model that is cached whole, or where the hub cannot be reached, those in the cache.
        """
        try:
            name = self._pinned(parse_hub_uri(uri))
            there = cached_files(name) if is_whole(name) else self._list(name)
        except ConfigError:
            return
        except WMTPError:
            name = parse_hub_uri(uri)
            if not name.is_pinned or not snapshot_of(name).is_dir():
                raise
            there = cached_files(name)
        for file in there.values():
            if file.name == ".gitattributes":  # git's, on every branch
                continue
            if file.name == name.path:
                yield evolve(file, name=PurePosixPath(file.name).name)
            elif _is_inside(file.name, name.path):
                yield evolve(file, name=file.name.removeprefix(f"{name.path}/") if name.path else file.name)

    def remove(self, uri: str) -> None:
        """Commit the removal of a file or folder; see `Storage.remove`.

        The commits before keep it.
        """
        name = parse_hub_uri(uri)
        gone = [CommitOperationDelete(file) for file in self._files_on_branch(name) if _is_inside(file, name.path)]
        if gone:
            self._commit(name, gone, f"Remove {name.path or 'all'} with wmtp")

    def check_push(self, uri: str) -> None:
        """Look for a token that may write; see `Storage.check_push`."""
        name = parse_hub_uri(uri)
        try:
            facts = patiently(self._api.whoami)
        except Exception as error:
            if is_unreachable(error) or is_offline(error):
                raise explained(error, name, writes=True) from error
            login = "log in with a token that may write: hf auth login, or HF_TOKEN"
            raise ConfigError(f"{name.uri}: to push there, {login}") from error
        if facts.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ConfigError(
                f"{name.uri}: your token may only read; make one that may write on {constants.ENDPOINT}/settings/tokens"
            )

    def push(self, path: Path, uri: str) -> None:
        """Commit a file or a folder; see `Storage.push`.

        It replaces what is at the path. A repository that is missing is made. Hidden files of a folder are left out.
        """
        name = parse_hub_uri(uri)
        local = _to_push(path, name)
        kind = KINDS[name.kind]
        try:
            patiently(lambda: self._api.create_repo(name.repo, repo_type=kind, private=self._private, exist_ok=True))
            if name.revision is not None:
                self._api.create_branch(name.repo, branch=name.revision, repo_type=kind, exist_ok=True)
        except Exception as error:
            raise explained(error, name, writes=True) from error
        replaced = self._files_on_branch(name) if path.is_dir() else []
        gone = [file for file in replaced if file not in local and file != ".gitattributes" and _is_inside(file, name.path)]
        added = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=place) for file, place in local.items()]
        self._commit(name, [*added, *map(CommitOperationDelete, gone)], f"Upload {path.name} with wmtp")

    def _files_on_branch(self, name: HubName) -> list[str]:
        _require_branch(name)
        kind = KINDS[name.kind]
        try:
            return patiently(lambda: self._api.list_repo_files(name.repo, repo_type=kind, revision=name.revision))
        except Exception as error:
            raise explained(error, name, writes=True) from error

    def _commit(self, name: HubName, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str) -> None:
        try:
            self._api.create_commit(
                name.repo, operations, commit_message=message, repo_type=KINDS[name.kind], revision=name.revision
            )
        except Exception as error:
            raise explained(error, name, writes=True) from error

    def _pinned(self, name: HubName) -> HubName:
        """Resolve a revision to a commit.

        The hub is asked, or where it cannot be, its cache.
        """
        if name.is_pinned:
            return name
        try:
            info = self._info(name)
        except Exception as error:
            if (is_unreachable(error) or is_offline(error)) and (commit := cached_commit(name)) is not None:
                reason = "HF_HUB_OFFLINE is set" if is_offline(error) else "the hub cannot be reached"
                logger.warning("%s: %s; taking the cached revision %s", name.uri, reason, commit)
                return name.pinned(commit)
            raise explained(error, name) from error
        if info.id != name.repo:
            logger.warning("%s: the hub has it as %s now; write that name", name.uri, info.id)
        pinned = name.pinned(str(info.sha), info.id)
        note_revision(pinned, name.revision or constants.DEFAULT_REVISION)
        self._listed[_key(pinned)] = _stored(info)
        return pinned

    def _info(self, name: HubName) -> Any:
        return patiently(
            lambda: self._api.repo_info(name.repo, repo_type=KINDS[name.kind], revision=name.revision, files_metadata=True)
        )

    def _list(self, name: HubName) -> Mapping[str, StoredFile]:
        """All files of a repository at a commit, by name."""
        if _key(name) not in self._listed:
            try:
                self._listed[_key(name)] = _stored(self._info(name))
            except Exception as error:
                raise explained(error, name) from error
        return self._listed[_key(name)]

    def _fetch(self, name: HubName, wanted: Mapping[str, int]) -> None:
        """Fetch what huggingface_hub's cache lacks, and check that all is there."""
        began = time.monotonic()
        snapshot = snapshot_of(name)
        missing = sum(size for file, size in wanted.items() if not (snapshot / file).exists())
        if missing:
            logger.info("%s: fetching %s into %s", name.uri, format_bytes(missing), snapshot)
        try:
            snapshot_download(
                name.repo,
                repo_type=KINDS[name.kind],
                revision=name.revision,
                allow_patterns=[glob.escape(file) for file in wanted],
                library_name="wmtp",
            )
        except Exception as error:
            raise explained(error, name) from error
        for file, size in wanted.items():
            found = (snapshot / file).stat().st_size if (snapshot / file).exists() else None
            if found != size:
                what = "is not there" if found is None else f"has {found:,} bytes in place of {size:,}: remove it"
                raise WMTPError(f"{name.uri}: {snapshot / file} {what}; run it again to fetch it")
        if missing:
            logger.info("%s: %d files are there (%.1f s)", name.uri, len(wanted), time.monotonic() - began)
        write_note(name, wanted)

    def _only_cached(self, name: HubName, snapshot: Path, error: WMTPError) -> Path:
        """Take what other programs have cached, where the hub cannot be asked."""
        path = snapshot / name.path if name.path else snapshot
        if not path.exists():
            raise error
        reason = "HF_HUB_OFFLINE is set" if is_offline(error.__cause__) else "the hub cannot be reached"
        logger.warning("%s: %s; taking what its cache holds: %s", name.uri, reason, path)
        return path


def _stored(info: Any) -> dict[str, StoredFile]:
    """List the files of what `HfApi.repo_info` gave."""
    return {
        file.rfilename: StoredFile(name=file.rfilename, size=file.size or 0, identity=str(file.blob_id))
        for file in info.siblings or ()
    }


def _require_branch(name: HubName) -> None:
    if name.is_pinned:
        raise ConfigError(f"{name.uri}: names a commit, which does not change; name a branch, or nothing behind '@'")


def _to_push(path: Path, name: HubName) -> dict[str, Path]:
    """Find the files to push, by their path in the repository."""
    _require_branch(name)
    if not path.exists():
        raise WMTPError(f"{path} cannot be copied to {name.uri}: {path} does not exist")
    if path.is_file():
        return {name.path or path.name: path}
    local = {}
    for file in sorted(files_below(path)):
        inside = file.relative_to(path)
        if file.is_symlink() and not file.exists():
            raise WMTPError(f"{path} cannot be copied to {name.uri}: {file} is a link to what does not exist")
        if file.is_file() and not is_hidden(inside):
            local[(PurePosixPath(name.path) / inside.as_posix()).as_posix()] = file
    return local


def _key(name: HubName) -> str:
    return evolve(name, path="").uri


def _is_inside(file: str, folder: str) -> bool:
    return not folder or file == folder or file.startswith(f"{folder}/")

"""Folders of huggingface_hub's cache on this machine.

Beside them are notes of what WMTP has found whole there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from wmtp.json_files import DAMAGE
from wmtp.storage.base import StoredFile
from wmtp.storage.hub.failures import explained
from wmtp.storage.hub.names import HubName

__all__ = ["KINDS", "cached_commit", "cached_files", "is_whole", "note_revision", "snapshot_of", "write_note"]

#: huggingface_hub's words for the kinds of repositories
KINDS: Final[Mapping[str, Literal["model", "dataset"]]] = {"models": "model", "datasets": "dataset"}


def _repo_folder(name: HubName) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name.repo, repo_type=KINDS[name.kind]))


def snapshot_of(name: HubName) -> Path:
    """Name the folder of the cache for a commit."""
    return _repo_folder(name) / "snapshots" / str(name.revision)


def cached_commit(name: HubName) -> str | None:
    """Look up the last known commit of a revision, if any."""
    reference = _repo_folder(name) / "refs" / (name.revision or constants.DEFAULT_REVISION)
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def _note_of(name: HubName) -> Path:
    """Return the path of the note of a commit's whole files."""
    return _repo_folder(name) / "wmtp" / f"{name.revision}{name.path.replace('/', '--')}.json"


def note_revision(pinned: HubName, revision: str) -> None:
    """Note in the cache which commit a revision is now.

    huggingface_hub does the same: without network a revision is taken by its name.
    """
    _write(_repo_folder(pinned) / "refs" / revision, str(pinned.revision), pinned)


def cached_files(name: HubName) -> dict[str, StoredFile]:
    """List the files that the cache has of a commit."""
    snapshot = snapshot_of(name)
    found = {file.relative_to(snapshot).as_posix(): file.stat().st_size for file in snapshot.rglob("*") if file.is_file()}
    return {file: StoredFile(name=file, size=size, identity=str(name.revision)) for file, size in found.items()}


def write_note(name: HubName, wanted: Mapping[str, int]) -> None:
    """Note the files that are whole, with their sizes."""
    _write(_note_of(name), json.dumps(dict(wanted)), name)


def _write(file: Path, text: str, name: HubName) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise explained(error, name) from error


def is_whole(name: HubName) -> bool:
    """Tell whether all noted files are still there, with their sizes."""
    snapshot = snapshot_of(name)
    try:
        files = json.loads(_note_of(name).read_text(encoding="utf-8"))
        return bool(files) and all((snapshot / file).stat().st_size == size for file, size in files.items())
    except (OSError, *DAMAGE):
        return False

"""Readers of a run's files, for those who show it.

What is not there is nothing, what is damaged is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import tomli

from wmtp.errors import FileError
from wmtp.json_files import read_json_object, reading

__all__ = [
    "CONFIG_FILE",
    "DOCUMENTS_FILE",
    "INFO_FILE",
    "SAMPLE_FILE",
    "UPLOADED_FILES",
    "read_info",
    "read_object",
    "read_snapshot",
]

CONFIG_FILE: Final = "config.toml"
INFO_FILE: Final = "run.json"

#: below ``checkpoints.uri``: the folder with the files of the run directory
UPLOADED_FILES: Final = "run"
#: losses of the last evaluation by document
DOCUMENTS_FILE: Final = "eval-documents.json"
#: a prompt, and the model's continuations before and after training
SAMPLE_FILE: Final = "sample.json"


#: types of what is read in ``run.json``; a key may be absent or null
_INFO_TYPES: Final = {
    **dict.fromkeys(("data", "given", "git", "versions"), dict),
    **dict.fromkeys(("argv", "resumed"), list),
    **dict.fromkeys(("ended", "started", "status"), str),
}


def read_info(run_dir: Path) -> dict[str, Any]:
    """Read ``run.json`` of a run; empty where there is none.

    Raises:
        FileError: it is damaged.
    """
    path = run_dir / INFO_FILE
    info = read_object(path)
    for key, kind in _INFO_TYPES.items():
        if not isinstance(info.get(key), kind | None):
            raise FileError(f"{path}: is damaged: {key} is {info[key]!r:.40}")
    for entry in info.get("resumed") or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("versions", {}), dict):
            raise FileError(f"{path}: is damaged: resumed has {entry!r:.40}")
    return info


def read_object(path: Path) -> dict[str, Any]:
    """Read a file's JSON object; empty where there is no file.

    Raises:
        FileError: it cannot be read, or holds something else; the message names it.
    """
    return read_json_object(path) if path.exists() else {}


def read_snapshot(path: Path) -> dict[str, Any]:
    """Read a run's ``config.toml`` as plain tables.

    Raises:
        FileError: it cannot be read; the message names it.
    """
    with reading(path):
        found = tomli.loads(path.read_text(encoding="utf-8"))
    for key, value in found.items():
        tables = value if key == "eval" and isinstance(value, list) else [value]
        if key in ("models", "datasets", "data") and isinstance(value, dict):
            tables = [*value.values()] if key != "data" else [each for each in value.values() if isinstance(each, list)]
        if not all(isinstance(table, dict) for table in tables):
            raise FileError(f"{path}: is damaged: [{key}] is no table")
    if not found:
        raise FileError(f"{path} is empty, though every run has its whole config there: bring it back, or start a new run")
    return found

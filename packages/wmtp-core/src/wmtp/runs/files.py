"""Reads the files of a run for those who show it: what is not there is nothing, what is damaged is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import tomli

from wmtp.errors import WMTPError
from wmtp.json_files import read_json_object

__all__ = ["CONFIG_FILE", "INFO_FILE", "UPLOADED_FILES", "read_object", "read_snapshot"]

CONFIG_FILE: Final = "config.toml"
INFO_FILE: Final = "run.json"

#: below ``checkpoints.uri``: the folder with the files of the run directory
UPLOADED_FILES: Final = "run"


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; an empty one where there is no file.

    Raises:
        WMTPError: it cannot be read, or holds something else; the message names it.
    """
    return read_json_object(path) if path.exists() else {}


def read_snapshot(path: Path) -> dict[str, Any]:
    """Read a run's ``config.toml`` as plain tables.

    Raises:
        WMTPError: it cannot be read; the message names it.
    """
    try:
        found = tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WMTPError(f"{path} cannot be read: {error}") from error
    if not found:
        raise WMTPError(f"{path} is empty, though every run has its whole config there: bring it back, or start a new run")
    return found

"""Reads JSON files that others wrote. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wmtp.errors import WMTPError

__all__ = ["read_json_object"]


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        WMTPError: the file cannot be read, or holds something else; the message names it.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise WMTPError(f"{path}: is not a file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WMTPError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WMTPError(f"{path}: holds no JSON object")
    return value

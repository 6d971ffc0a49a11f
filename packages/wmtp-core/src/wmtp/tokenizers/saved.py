"""File beside a saved model that names the tokenizer of its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from wmtp.errors import FileError
from wmtp.json_files import read_json_object
from wmtp.tokenizers.chat_template import TEMPLATE_NAME

__all__ = ["SAVED_NAME", "read_saved", "read_template", "write_saved", "write_template"]

SAVED_NAME: Final = "wmtp_tokenizer.json"


def write_saved(folder: Path, kind: str, **options: Any) -> None:
    """Write the tokenizer's ``type`` and its options into a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SAVED_NAME).write_text(json.dumps({"type": kind, **options}, indent=2) + "\n", encoding="utf-8")


def read_saved(folder: Path) -> Mapping[str, Any] | None:
    """Read the file of `write_saved`; None where the folder has none.

    Raises:
        FileError: the file is damaged.
    """
    path = folder / SAVED_NAME
    if not path.is_file():
        return None
    saved = read_json_object(path, "save the model again")
    if not isinstance(saved.get("type"), str):
        raise FileError(f"{path}: has no 'type'; save the model again")
    return saved


def write_template(folder: Path, template: str | Mapping[str, str] | None) -> None:
    """Write a chat template where transformers keeps it.

    For tokenizers that are not of transformers.
    """
    if isinstance(template, str):
        (folder / TEMPLATE_NAME).write_text(template, encoding="utf-8")


def read_template(folder: Path) -> str | None:
    """Read the chat template in a model folder, if any."""
    path = folder / TEMPLATE_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None

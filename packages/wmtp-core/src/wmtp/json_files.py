"""Reading of files that others wrote, with errors that name them.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from wmtp.errors import FileError, WMTPError

__all__ = ["DAMAGE", "read_json", "read_json_object", "reading", "unique_keys", "writing"]

#: what reading a file and its values raises where the content is not what it was meant to be; a deep one overflows the stack
DAMAGE: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)


@contextmanager
def reading(where: Path | str, advice: str = "") -> Iterator[None]:
    """Name the file in whatever its content raises within this block.

    Args:
        where: the file, as messages call it.
        advice: the end of the message: what to do.

    Raises:
        FileError: instead of any other error that a missing or damaged file causes.
    """
    end = f"; {advice}" if advice else ""
    try:
        yield
    except OSError as error:
        raise FileError(f"{where}: cannot be read: {error.strerror or error}{end}") from error
    except DAMAGE as error:
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, MemoryError):
            reason = "it needs more memory than there is"
        else:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise FileError(f"{where}: is damaged: {reason}{end}") from error


@contextmanager
def writing(where: Path | str) -> Iterator[None]:
    """Name the file in whatever the system says to writing it.

    Raises:
        WMTPError: instead of an OSError: the disk is full, or the folder is not writable.
    """
    try:
        yield
    except OSError as error:
        raise WMTPError(f"{where}: cannot be written: {error.strerror or error}") from error


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, each key once; for ``object_pairs_hook``.

    Of a key's two values Python's json keeps one without a word.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'an object has the key "{twice:.40}" twice; leave one out')
    return found


def read_json(path: Path, advice: str = "") -> Any:
    """Read a JSON file.

    Raises:
        FileError: it cannot be read, or is none; the message names it.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise FileError(f"{path}: is not a file")
    with reading(path, advice):
        text = path.read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except ValueError as error:
            raise FileError(f"{path}: cannot be read as JSON: {error}{f'; {advice}' if advice else ''}") from error


def read_json_object(path: Path, advice: str = "") -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FileError: the file cannot be read, or holds something else; the message names it.
    """
    value = read_json(path, advice)
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds no JSON object{f'; {advice}' if advice else ''}")
    return value

"""A TOML file, and the line of each of its keys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import tomli

from wmtp.config.problems import KeyPath
from wmtp.errors import ConfigError
from wmtp.spelling import odd_character
from wmtp.storage.uris import local_path

__all__ = ["FileSource", "TableSource", "contains"]

_RECIPE: Final = "a recipe is a TOML file that names model and data, as `wmtp init` writes it"


class FileSource:
    """One TOML file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is not TOML; with the line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        if not self.name:  # Path takes it for the current directory
            raise ConfigError("the name of a config file is empty; name a TOML file")
        try:
            raw = local_path(path).read_bytes()
        except FileNotFoundError:
            hint = f"; a setting is given by --set {self.name}" if "=" in self.name else ""
            raise ConfigError(f"{self.name}: there is no such file; the current directory is {Path.cwd()}{hint}") from None
        except IsADirectoryError:
            raise ConfigError(f"{self.name}: is a directory; name a TOML file{_in_folder(Path(path))}") from None
        except OSError as error:
            raise ConfigError(f"{self.name}: cannot be read: {error.strerror}") from None
        try:
            self.text = raw.decode("utf-8-sig").replace("\r\n", "\n")  # Windows editors write a byte order mark
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            hint = "; it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise ConfigError(f"{self.name}:{line}: is not UTF-8 text{hint}; save the file as UTF-8") from None
        try:
            self.data: dict[str, Any] = tomli.loads(self.text)
        except tomli.TOMLDecodeError as error:
            where = f"{self.name}:{error.lineno}: this is not TOML: {error.msg} (column {error.colno})"
            hint = odd_character(self.text[error.pos : error.pos + 1]) or _meant(self.text, error)
            hint += "" if Path(path).suffix == ".toml" else f"; {_RECIPE}"
            raise ConfigError(f"{where}{hint}") from None
        except RecursionError:
            raise ConfigError(f"{self.name}: is nested too deeply") from None

    @cached_property
    def _lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def _parsed(self) -> dict[int, dict[str, Any] | None]:
        return {}

    def _prefix(self, lines: int) -> dict[str, Any] | None:
        """Parse the first ``lines`` lines; None where they end inside a statement."""
        if lines not in self._parsed:
            try:
                self._parsed[lines] = tomli.loads("\n".join(self._lines[:lines]))
            except tomli.TOMLDecodeError:
                self._parsed[lines] = None
        return self._parsed[lines]

    def _complete(self, lines: int) -> int:
        """Find the longest prefix that ends between two statements.

        It has at most ``lines`` lines.
        """
        while self._prefix(lines) is None:
            lines -= 1
        return lines

    def where(self, path: KeyPath) -> str:
        """Return ``file:line`` of the statement that first mentions ``path``.

        For a path that is not in the file, that of the nearest table around it.

        There is no second TOML grammar here: the statement is the one whose end makes the path appear in the file's first
        lines, parsed as a file of their own. Keys never disappear further down, so a binary search finds it.
        """
        while path and not contains(self.data, path):
            path = path[:-1]
        if not path:
            return self.name
        low, high = 0, len(self._lines)  # the path is not in the first `low` lines; it is in the first `high`
        while high - low > 1:
            middle = self._complete((low + high) // 2)
            if middle <= low:
                low_end = (low + high) // 2
                middle = next(n for n in range(low_end + 1, high + 1) if self._prefix(n) is not None)
                if middle == high:
                    break  # one statement of several lines is left
            if contains(self._prefix(middle) or {}, path):
                high = middle
            else:
                low = middle
        start = low
        while start < high - 1 and self._lines[start].lstrip()[:1] in ("", "#"):
            start += 1
        return f"{self.name}:{start + 1}"


class TableSource(Mapping[str, Any]):
    """Table inside a TOML file, merged into a config like a file.

    Args:
        data: what is laid over.
        file: where it stands; None for a table from Python, which has no lines.
        path: of the table in the file.
    """

    def __init__(self, data: Mapping[str, Any], file: FileSource | None, path: KeyPath) -> None:
        self._data, self._file, self._path = data, file, path

    def where(self, path: KeyPath) -> str | None:
        """``file:line`` of a key of the table; see `FileSource.where`."""
        return None if self._file is None else self._file.where((*self._path, *path))

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


def _in_folder(folder: Path) -> str:
    """Say what to write in place of a folder."""
    if (folder / "run.json").exists():
        return f"; to resume this run: --resume {folder}"
    if (folder / "config.json").exists():
        return f'; this model folder goes into one, as models.base = {{ type = "hf", uri = "{folder}" }}'
    recipes = sorted(folder.glob("*.toml"))
    return f", as {recipes[0]}" if len(recipes) == 1 else f"; {_RECIPE}"


def _meant(text: str, error: tomli.TOMLDecodeError) -> str:
    """Say what to write in place of what other languages have."""
    if error.msg.startswith(("Cannot overwrite", "Cannot declare")):
        return "; it is in the file already: leave one out"
    if "hex value" in error.msg or error.msg.startswith("Unescaped"):
        return "; in \"…\" a backslash begins an escape; write '…', or / in a path"
    word = re.match(r"[\w./~-]*", text[error.pos :])
    written = word[0] if word else ""
    if error.msg != "Invalid value" or not written:
        return ""
    if written in ("True", "False"):
        return f"; write {written.lower()}"
    if re.fullmatch(r"-?\.[0-9][0-9e-]*", written):
        return f"; write {written.replace('.', '0.')}"
    return "; TOML has no such value: leave the key out" if written in ("None", "null") else f'; a text has quotes: "{written}"'


def contains(data: Any, path: KeyPath) -> bool:
    """Tell whether nested tables and arrays have a key."""
    for key in path:
        if isinstance(data, dict) and key in data:
            data = data[str(key)]
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            return False
    return True

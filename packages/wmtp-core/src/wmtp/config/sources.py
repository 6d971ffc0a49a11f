"""TOML files, mappings and ``--set``: merged into one mapping that remembers where each value came from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import tomli
from attrs import define, field

from wmtp.config.problems import KeyPath, Problem, dotted
from wmtp.errors import ConfigError

__all__ = ["Document", "FileSource", "MappingSource", "Override", "escape", "parse_override"]

#: sections whose ``type`` is a plain key: changing it keeps the table's other keys
_PLAIN_SECTIONS: Final = frozenset({"run", "data", "schedule", "train", "devices", "checkpoints", "storage"})
_REFERENCE: Final = re.compile(r"\$(?P<escaped>\$+\{env:)|\$\{env:(?:(?P<inner>[^{}]*)\})?")
_REFERENCE_START: Final = re.compile(r"\$+\{env:")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class FileSource:
    """One TOML file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is not TOML; with the line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            raw = Path(path).expanduser().read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"{self.name}: there is no such file; the current directory is {Path.cwd()}") from None
        except IsADirectoryError:
            raise ConfigError(f"{self.name}: is a directory; name a TOML file") from None
        except OSError as error:
            raise ConfigError(f"{self.name}: cannot be read: {error.strerror}") from None
        except ValueError:
            raise ConfigError(f"{self.name!r} is no path: it holds a NUL character") from None
        try:
            self.text = raw.decode("utf-8-sig").replace("\r\n", "\n")  # Windows editors write a byte order mark
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            hint = "; it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise ConfigError(f"{self.name}:{line}: is not UTF-8 text{hint}; save the file as UTF-8") from None
        try:
            self.data: dict[str, Any] = tomli.loads(self.text)
        except tomli.TOMLDecodeError as error:
            raise ConfigError(f"{self.name}:{error.lineno}: this is not TOML: {error.msg} (column {error.colno})") from None
        except RecursionError:
            raise ConfigError(f"{self.name}: is nested too deeply") from None

    @cached_property
    def _lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def _parsed(self) -> dict[int, dict[str, Any] | None]:
        return {}

    def _prefix(self, lines: int) -> dict[str, Any] | None:
        """The first ``lines`` lines as TOML; None where they end in the middle of a statement."""
        if lines not in self._parsed:
            try:
                self._parsed[lines] = tomli.loads("\n".join(self._lines[:lines]))
            except tomli.TOMLDecodeError:
                self._parsed[lines] = None
        return self._parsed[lines]

    def _complete(self, lines: int) -> int:
        """The longest prefix of at most ``lines`` lines that ends between two statements."""
        while self._prefix(lines) is None:
            lines -= 1
        return lines

    def where(self, path: KeyPath) -> str:
        """``file:line`` of the statement that first mentions ``path``, or the nearest table around it.

        There is no second TOML grammar here: the statement is the one whose end makes the path appear in the file's first
        lines, parsed as a file of their own. Keys never disappear further down, so a binary search finds it.
        """
        while path and not _contains(self.data, path):
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
            if _contains(self._prefix(middle) or {}, path):
                high = middle
            else:
                low = middle
        start = low
        while start < high - 1 and self._lines[start].lstrip()[:1] in ("", "#"):
            start += 1
        return f"{self.name}:{start + 1}"


@define
class Override:
    """One ``--set KEY=VALUE``.

    Args:
        path: the key.
        value: as TOML, or the text itself.
    """

    path: KeyPath
    value: Any

    def where(self, _: KeyPath) -> str:
        """What a message says in place of a file."""
        return f"--set {dotted(self.path)}"


class MappingSource:
    """A mapping from Python code; it has no lines."""

    def where(self, _: KeyPath) -> None:
        """Nowhere."""
        return


Source = FileSource | Override | MappingSource


def parse_override(text: str) -> Override:
    """Read ``KEY=VALUE``: a dotted TOML key, and a TOML value or a bare word, which is a string.

    Raises:
        ConfigError: it has no ``=``, or a key or value that cannot be read.
    """
    for match in re.finditer("=", text):
        path = _override_key(text[: match.start()].strip())
        if path is not None:
            return Override(path, _override_value(text, text[match.end() :].strip()))
    if "=" not in text:
        raise ConfigError(f"--set {text}: has no value; write --set {text or 'KEY'}=VALUE")
    raise ConfigError(f"--set {text}: '{text.partition('=')[0]}' is no key; write it with dots, as in trainer.type=NAME")


def _override_key(text: str) -> KeyPath | None:
    try:
        table: Any = tomli.loads(f"{text} = 0") if "\n" not in text else {}
    except tomli.TOMLDecodeError:
        return None
    path: list[str] = []
    while isinstance(table, dict) and len(table) == 1:
        [(key, table)] = table.items()
        path.append(key)
    return tuple(path) if path and table == 0 else None


def _override_value(whole: str, text: str) -> Any:
    import datetime

    try:
        # inside an array a comment cannot hide part of the text, and a line break starts no new key
        values = tomli.loads(f"value = [{text}]")["value"]
    except tomli.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ConfigError(f"--set {whole}: the value is not TOML: {error.msg}") from None
        return text
    if len(values) != 1 or text.endswith(",") or isinstance(values[0], datetime.date | datetime.time):
        return text
    return values[0]


@define
class Document:
    """Sources merged left to right. The later one wins.

    Tables are merged key by key, everything else is replaced, arrays too. In a component's table a new ``type`` drops the
    keys of the old one, which belonged to another class (``heads`` in ``[models.*]`` stays); keys from ``--set`` are never
    dropped, so that none is ignored in silence, and ``[schedule]`` and other plain sections keep theirs.
    """

    data: dict[str, Any] = field(factory=dict)
    origins: dict[KeyPath, Source] = field(factory=dict)

    def merge(self, data: Mapping[str, Any], source: Source) -> None:
        """Lay a whole mapping over what is there. None in it takes a key away."""
        self._merge(self.data, data, (), source)

    def _merge(self, old: dict[str, Any], new: Mapping[str, Any], path: KeyPath, source: Source) -> None:
        if "type" in old and "type" in new and old["type"] != new["type"] and path and path[0] not in _PLAIN_SECTIONS:
            for key in [key for key in old if not self._stays((*path, key))]:
                self._remove(old, key, (*path, key))
            self.origins[path] = source
        for key, value in new.items():
            here = (*path, key)
            if value is None:
                self._remove(old, key, here)
            elif isinstance(value, Mapping) and isinstance(old.get(key), dict):
                self._merge(old[key], value, here, source)
            else:
                self._remove(old, key, here)
                old[key] = self._copied(value, here, source)

    def _stays(self, path: KeyPath) -> bool:
        return isinstance(self.origins.get(path), Override) or (len(path) == 3 and path[0] == "models" and path[2] == "heads")

    def _remove(self, table: dict[str, Any], key: str, path: KeyPath) -> None:
        if table.pop(key, None) is not None:
            self._forget(path)

    def _forget(self, path: KeyPath) -> None:
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]

    def _copied(self, value: Any, path: KeyPath, source: Source) -> Any:
        self.origins[path] = source
        if isinstance(value, Mapping):
            return {k: self._copied(v, (*path, k), source) for k, v in value.items() if v is not None}
        if isinstance(value, list | tuple):
            return [self._copied(v, (*path, i), source) for i, v in enumerate(value)]
        return value

    def override(self, override: Override) -> None:
        """Apply one ``--set``. A number in its key counts the elements of an array from 0; the next free one adds to it.

        Raises:
            ConfigError: there is no such element.
        """
        keys = list(override.path)
        node: Any = self.data
        here: KeyPath = ()
        while len(keys) > 1:  # as far down as there are tables and arrays already
            if not here and keys[0] == "eval" and "eval" not in node:
                node["eval"] = []
                self.origins[("eval",)] = override
            key = self._index(node, keys[0], here, override) if isinstance(node, list) else keys[0]
            if isinstance(node, list) and key == len(node):
                node.append(self._copied({}, (*here, key), override))
            child: Any = node[key] if isinstance(node, list) or key in node else None  # type: ignore[index]
            if not isinstance(child, dict | list):
                break
            node, here = child, (*here, key)
            del keys[0]
        value = override.value
        for key in reversed(keys[1:]):
            value = {key: value}
        if isinstance(node, list):
            index = self._index(node, keys[0], here, override)
            self._forget((*here, index))
            node[index : index + 1] = [self._copied(value, (*here, index), override)]
        else:
            self._merge(node, {str(keys[0]): value}, here, override)

    def _index(self, array: list[Any], key: str | int, path: KeyPath, override: Override) -> int:
        index = int(key) if str(key).isdecimal() else -1
        if not 0 <= index <= len(array):
            raise ConfigError(
                f"{override.where(())}: {dotted(path)} is an array of {len(array)}; write an index of 0 to {len(array)}"
                f" in place of '{key}'"
            )
        return index

    def expand(self, environment: Mapping[str, str]) -> list[Problem]:
        """Replace ``${env:NAME}`` and ``${env:NAME:default}`` in all strings; ``$${env:`` stands for itself.

        Returns:
            what could not be replaced.
        """
        problems: list[Problem] = []

        def walk(value: Any, path: KeyPath) -> Any:
            if isinstance(value, dict):
                return {k: walk(v, (*path, k)) for k, v in value.items()}
            if isinstance(value, list):
                return [walk(v, (*path, i)) for i, v in enumerate(value)]
            return _REFERENCE.sub(lambda match: replace(match, path), value) if isinstance(value, str) else value

        def replace(match: re.Match[str], path: KeyPath) -> str:
            if match["escaped"] is not None:
                return match["escaped"]
            if match["inner"] is None:
                problems.append(Problem(path, "'${env:' without its '}', or one inside another"))
                return match[0]
            name, colon, default = match["inner"].partition(":")
            if not _NAME.fullmatch(name):
                problems.append(Problem(path, f"'{name}' is no name of an environment variable, in {match[0]}"))
            elif name in environment:
                return environment[name]
            elif not colon:
                advice = f"set it, or write ${{env:{name}:VALUE}} with a default"
                problems.append(Problem(path, f"environment variable '{name}' is not set; {advice}"))
            return default

        self.data = walk(self.data, ())
        return problems

    def locate(self, problem: Problem) -> str:
        """The message with its place: ``recipe.toml:5: trainer.gama: unknown key``."""
        at = problem.path if problem.at is None else problem.at
        while at and at not in self.origins:
            at = at[:-1]
        source = self.origins.get(at)
        place = source.where(at) if source is not None else None
        key = dotted(problem.path)
        if isinstance(source, Override) and problem.path == source.path:
            key = ""
        return ": ".join(part for part in (place, key, problem.message) if part)


def escape(text: str) -> str:
    """A string that `Document.expand` turns back into ``text``."""
    return _REFERENCE_START.sub(lambda match: "$" + match[0], text)


def _contains(data: Any, path: KeyPath) -> bool:
    for key in path:
        if isinstance(data, dict) and key in data:
            data = data[str(key)]
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            return False
    return True

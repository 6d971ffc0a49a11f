"""Merging of TOML files, mappings and ``--set``.

The merged mapping remembers where each value came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from attrs import define, field, frozen

from wmtp.config.overrides import Override
from wmtp.config.problems import KeyPath, Problem, dotted
from wmtp.config.toml_file import FileSource, TableSource, contains
from wmtp.errors import ConfigError
from wmtp.plugins.components import OWN_TABLES

__all__ = ["Document", "MappingSource", "escape"]

#: sections whose ``type`` is a plain key: changing it keeps the table's other keys
_PLAIN_SECTIONS: Final = frozenset({"run", "data", "schedule", "train", "devices", "checkpoints", "storage"})
_REFERENCE: Final = re.compile(r"\$(?P<escaped>\$+\{env:)|\$\{env:(?:(?P<inner>[^{}]*)\})?")
_SECRET_VARIABLE: Final = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE|SECRET)_?KEY)$", re.IGNORECASE
)
_REFERENCE_START: Final = re.compile(r"\$+\{env:")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class MappingSource:
    """A mapping from Python code; it has no lines."""

    def where(self, _: KeyPath) -> None:
        """Nowhere."""
        return


Source = FileSource | TableSource | Override | MappingSource


@frozen
class _Dropped:
    """Keys that a new ``type`` has dropped.

    Args:
        place: of the new type: a file, a line and the key, or ``--set``.
        table: that the keys were in.
        new: the type.
        old: what it was.
        keys: that the old one had.
    """

    place: str
    table: KeyPath
    new: object
    old: object
    keys: tuple[str, ...]


@define
class Document:
    """Sources merged left to right. The later one wins.

    Tables are merged key by key, everything else is replaced, arrays too. In a component's table a new ``type`` drops the
    keys of the old one, which belonged to another class (``heads`` in ``[models.*]`` stays); keys from ``--set`` are never
    dropped, so that none is ignored in silence, and ``[schedule]`` and other plain sections keep theirs.
    """

    data: dict[str, Any] = field(factory=dict)
    origins: dict[KeyPath, Source] = field(factory=dict)
    nothing: set[KeyPath] = field(factory=set, init=False)  #: keys of None that there was nothing to take away at
    _dropped: list[_Dropped] = field(factory=list, init=False)

    def merge(self, data: Mapping[str, Any], source: Source) -> None:
        """Lay a whole mapping over what is there.

        None in it takes a key away.
        """
        self._merge(self.data, data, (), source)

    def _merge(self, old: dict[str, Any], new: Mapping[str, Any], path: KeyPath, source: Source) -> None:
        if "type" in old and "type" in new and old["type"] != new["type"] and path and path[0] not in _PLAIN_SECTIONS:
            keys = [key for key in old if not self._stays((*path, key))]
            here = (*path, "type")
            key = "" if isinstance(source, Override) and source.path == here else dotted(here)
            place = ": ".join(part for part in (source.where(here), key) if part)
            self._dropped.append(_Dropped(place, path, new["type"], old["type"], tuple(key for key in keys if key != "type")))
            for key in keys:
                self._remove(old, key, (*path, key))
            self.origins[path] = source
        for key, value in new.items():
            here = (*path, key)
            if value is None:
                if key not in old:
                    self.nothing.add(here)
                self._remove(old, key, here)
            elif isinstance(value, Mapping) and isinstance(old.get(key), dict):
                self._merge(old[key], value, here, source)
            else:
                self._remove(old, key, here)
                old[key] = self._copied(value, here, source)

    def _stays(self, path: KeyPath) -> bool:
        return isinstance(self.origins.get(path), Override) or (
            len(path) == 3 and path[0] == "models" and path[2] in OWN_TABLES
        )

    def _remove(self, table: dict[str, Any], key: str, path: KeyPath) -> None:
        if table.pop(key, None) is not None:
            self._forget(path)

    def _forget(self, path: KeyPath) -> None:
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]

    def _copied(self, value: Any, path: KeyPath, source: Source) -> Any:
        self.origins[path] = source
        if isinstance(value, Mapping):
            self.nothing |= {(*path, k) for k, v in value.items() if v is None}
            return {k: self._copied(v, (*path, k), source) for k, v in value.items() if v is not None}
        if isinstance(value, list | tuple):
            return [self._copied(v, (*path, i), source) for i, v in enumerate(value)]
        return value

    def override(self, override: Override) -> None:
        """Apply one ``--set``.

        A number in its key counts the elements of an array from 0; the next free one adds to it.

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
            elif _SECRET_VARIABLE.search(name):  # its value may look like anything
                advice = "services read such variables themselves: leave it out, or, if it is none, call it something else"
                problems.append(Problem(path, f"'{name}' names a secret, which would be saved with the run; {advice}"))
            elif name in environment:
                return environment[name]
            elif not colon:
                advice = f"set it, or write ${{env:{name}:VALUE}} with a default"
                problems.append(Problem(path, f"environment variable '{name}' is not set; {advice}"))
            return default

        self.data = walk(self.data, ())
        return problems

    def drops(self) -> Iterator[str]:
        """Name keys that a new ``type`` dropped and nothing set again."""
        for drop in self._dropped:
            if keys := [key for key in drop.keys if not contains(self.data, (*drop.table, key))]:
                again = f"set {'it' if len(keys) == 1 else 'them'} again where still meant"
                yield f"{drop.place}: {drop.new!r} in place of {drop.old!r} drops {', '.join(sorted(keys))}; {again}"

    def source(self, path: KeyPath) -> Source | None:
        """Where a key came from, or else the table around it."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path)

    def locate(self, problem: Problem) -> str:
        """Format a problem with its place: ``recipe.toml:5: trainer.gama: unknown key``."""
        at = problem.path if problem.at is None else problem.at
        source = self.source(at)
        while at and at not in self.origins:
            at = at[:-1]
        place = source.where(at) if source is not None else None
        key = dotted(problem.path)
        if isinstance(source, Override) and problem.path == source.path:
            key = ""
        dropped = [drop for drop in self._dropped if drop.table == problem.path[:-1] and problem.path[-1] in drop.keys]
        message = problem.message
        if dropped and not contains(self.data, problem.path):
            message += f"; that of {dropped[-1].old!r} was dropped with its type: set it again"
        return ": ".join(part for part in (place, key, message) if part)


def escape(text: str) -> str:
    """A string that `Document.expand` turns back into ``text``."""
    return _REFERENCE_START.sub(lambda match: "$" + match[0], text)

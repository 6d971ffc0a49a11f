"""Problems of a config, each with the key that it concerns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from attrs import frozen

from wmtp.config.neighbours import known_elsewhere
from wmtp.config.own_keys import own_places
from wmtp.spelling import did_you_mean, nearest

__all__ = ["KeyPath", "Problem", "Problems", "dotted", "unknown_key"]

#: where a value stands: names of tables and keys, and indices into arrays
KeyPath = tuple[str | int, ...]

_ALMOST: Final = 0.85  # a slip of the keyboard, whatever the word means elsewhere
_KEY: Final = re.compile(r"[\w.-]+")
_BARE: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def dotted(path: KeyPath) -> str:
    """``models.base.uri``; a name that needs quotes in TOML gets them."""
    parts = (str(part) if isinstance(part, int) or (part and set(part) <= _BARE) else f'"{part}"' for part in path)
    return ".".join(parts)


@frozen
class Problem:
    """One thing that is wrong.

    Args:
        path: the key that the message is about; empty for the whole config.
        message: what is wrong; what to do.
        at: the key to point at, where that is not ``path``: the ``type`` of a table, for instance.
    """

    path: KeyPath
    message: str
    at: KeyPath | None = None

    @classmethod
    def of_line(cls, line: str, *parents: str | int) -> Problem:
        """Read a line ``key: message``, as components' own checks write it.

        Its key is one below ``parents``; a line without a key concerns these.
        """
        key, colon, message = line.partition(": ")
        if colon and _KEY.fullmatch(key):
            return cls((*parents, *key.split(".")), message)
        return cls(parents, line)

    def under(self, *parents: str | int) -> Problem:
        """Return the same problem, seen from a table further out."""
        return Problem((*parents, *self.path), self.message, (*parents, *self.at) if self.at is not None else None)


class Problems(Exception):
    """Several problems at once, by paths relative to the value read."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(problem.message for problem in self.problems))

    @classmethod
    def one(cls, message: str, *path: str | int) -> Problems:
        """A single problem."""
        return cls([Problem(path, message)])


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Write the message for a key that a table does not have."""
    names = list(known)
    if nearest(name, names, cutoff=_ALMOST) is None:
        if elsewhere := known_elsewhere(name):
            return f"unknown key; {elsewhere}"
        if places := own_places(name):
            return f"unknown key in this table; there is {' and '.join(places)}"
    if hint := did_you_mean(name, names):
        return f"unknown key; {hint}"
    return f"unknown key; keys: {', '.join(names)}" if names else "unknown key; this table has no keys"

"""Reads single values, strictly, and says what is wrong with them."""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, get_args

from wmtp.config.problems import Problems
from wmtp.spelling import did_you_mean

__all__ = ["enum_member", "literal", "message_of", "number", "scalar", "shown", "wrong"]

_LARGEST: Final = 2**63 - 1
_BOOLEANS: Final = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


def shown(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array"
    text = repr(value) if isinstance(value, str | int | float) else f"{value} ({type(value).__name__})"
    return text if len(text) <= 80 else text[:77] + "..."


def wrong(expected: str, value: Any) -> Problems:
    """Make the problem of a value of another type."""
    hint = ""
    if isinstance(value, str) and re.fullmatch(r"true|false|[+-]?[0-9.]+(e[+-]?[0-9]+)?", value):
        hint = " (a string: leave the quotes out)"
    elif expected == "true or false" and isinstance(value, str) and (plain := _BOOLEANS.get(value.lower())):
        hint = f"; write {plain}"
    elif expected == "a whole number" and isinstance(value, float) and value.is_integer():
        hint = f"; write {value:.0f}"
    elif expected == "a string" and isinstance(value, int | float):
        hint = " (put it in quotes)"
    elif expected == "a string" and isinstance(value, os.PathLike):
        hint = "; write str(path)"
    return Problems.one(f"must be {expected}, not {shown(value)}{hint}")


def scalar(wanted: type, name: str) -> Callable[[Any, Any], Any]:
    """A hook that takes exactly this type."""

    def read(value: Any, _: Any) -> Any:
        if type(value) is not wanted:  # a bool is an int to isinstance
            raise wrong(name, value)
        if isinstance(value, int) and not -_LARGEST - 1 <= value <= _LARGEST:  # no tensor, file or count holds more
            raise Problems.one(f"is too large for a whole number, which has 64 bits: at most {_LARGEST}")
        return value

    return read


def number(value: Any, _: Any) -> float:
    """A number; a whole one will do."""
    if type(value) not in (int, float):
        raise wrong("a number", value)
    try:
        result = float(value)
    except OverflowError:
        raise Problems.one("is too large for a number") from None
    if math.isnan(result):
        raise wrong("a number", value)
    return result


def literal(value: Any, type_: Any) -> Any:
    """One of the choices of a ``Literal``."""
    choices = get_args(type_)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise Problems.one(_not_a_choice(choices, value))


def enum_member(value: Any, type_: type[enum.Enum]) -> enum.Enum:
    """A member of an enum, by its value."""
    if type(value) is type_:
        return value
    for member in type_:
        if type(member.value) is type(value) and member.value == value:
            return member
    raise Problems.one(_not_a_choice([member.value for member in type_], value))


def _not_a_choice(choices: Iterable[Any], value: Any) -> str:
    names = list(choices)
    hint = did_you_mean(value, [n for n in names if isinstance(n, str)]) if isinstance(value, str) else None
    return f"must be one of {', '.join(shown(name) for name in names)}, not {shown(value)}{f'; {hint}' if hint else ''}"


def message_of(error: Exception, name: str | None = None) -> str:
    """Return an exception's text on one line.

    attrs' own begin with the field's name, which the key says already.
    """
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"KeyError: {text}"
    if name is None:
        return text
    text = re.sub(rf"^Length of '{name}' must be >= \d+: 0$", "must not be empty", text)
    return re.sub(r"^(must be [<>=]+ \S+): (\S+)$", r"\1, not \2", text.removeprefix(f"'{name}' "))

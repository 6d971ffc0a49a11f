"""Takes values out of a record, each checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from wmtp.data.base import BadExample

__all__ = [
    "Cell",
    "Unreadable",
    "bool_field",
    "finite_number",
    "is_cut",
    "keys_of",
    "name_field",
    "number_field",
    "shared_column",
    "text_field",
    "type_name",
]


class Unreadable:
    """Value of a table that Python has no object for.

    Bytes that are no UTF-8, or a date beyond the year 9999.
    """


class Cell(str):
    """Cell of a CSV file.

    There a number is a text too, and no value is an empty text.
    """

    __slots__ = ()


_TYPE_NAMES: Final = {
    list: "a list",
    dict: "an object",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
    Cell: "a text",
    Unreadable: "a value that cannot be read (text that is no UTF-8, or a date that is out of range)",
}

#: why an answer ended that did not end by itself
_CUT: Final = ("length", "context")

#: tables with empty cells write 1 as 1.0
_TRUTHS: Final = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def shared_column(keys: Mapping[str, str], fields: Iterable[str]) -> str | None:
    """Describe fields that would be read from one column, if any.

    Args:
        keys: by field, the name of its column; of those that it lacks, the field's own. What is called ``""`` is not read.
        fields: those that need columns of their own.
    """
    readers: dict[str, list[str]] = {}
    for name in fields:
        readers.setdefault(keys.get(name, name), []).append(name)
    for column, names in readers.items():
        if column and len(names) > 1:
            unread = " or ".join(f'{name} = ""' for name in names)
            return (
                f'{" and ".join(names)} are read from one column, "{column}"; name another one, or write {unread} for what is '
                "not to be read"
            )
    return None


def type_name(value: Any) -> str:
    """Name a value's type for an error message."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def keys_of(record: Mapping[str, Any]) -> str:
    """Name the keys of a record, for an error message."""
    return f"the keys here are {', '.join(map(str, record)) or 'none'}"


def text_field(where: str, record: Mapping[str, Any], key: str) -> str:
    r"""Return the string under ``key``, with ``\n`` at every line's end.

    Raises:
        BadExample: it is missing or no string.
    """
    if key not in record:
        raise BadExample(where, f'no "{key}"; {keys_of(record)}')
    value = record[key]
    if not isinstance(value, str):
        raise BadExample(where, f'"{key}" must be a string, not {type_name(value)}')
    return str(value).replace("\r\n", "\n")


def name_field(record: Mapping[str, Any], key: str) -> str:
    """Read any value under ``key`` as a name; empty without one.

    A name is only compared with others, so any value will do: 3.0 is "3", since tables make whole numbers into floats where a
    cell is empty.
    """
    value = record.get(key)
    if value is None or value != value or isinstance(value, Unreadable):  # NaN
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True, default=str)


def is_cut(record: Mapping[str, Any], key: str) -> bool:
    """Tell whether an answer was cut off.

    ``wmtp distill-data`` and servers write why it ended.
    """
    return record.get(key) in _CUT


def bool_field(where: str, record: Mapping[str, Any], key: str) -> bool | None:
    """Return the boolean under ``key``; None where missing or null.

    It may be written 0 or 1.

    Raises:
        BadExample: it is something else.
    """
    value = record.get(key)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, Cell):
        if not value or value.lower() in _TRUTHS:
            return _TRUTHS.get(value.lower())
        raise BadExample(where, f'"{key}" must be true or false, not {value!r:.40}{_leave_out(key)}')
    raise BadExample(where, f'"{key}" must be true or false, not {type_name(value)}{_leave_out(key)}')


def number_field(where: str, record: Mapping[str, Any], key: str) -> float | None:
    """Return the finite number under ``key``; None where missing or null.

    Raises:
        BadExample: it is something else.
    """
    value = record.get(key)
    if isinstance(value, Cell):
        try:
            value = float(value) if value else None
        except ValueError:
            raise BadExample(where, f'"{key}" must be a number, not {value!r:.40}{_leave_out(key)}') from None
    return None if value is None else finite_number(where, value, f'"{key}"', _leave_out(key))


def _leave_out(key: str) -> str:
    return f'; if it is something else, leave it out: keys = {{ {key} = "" }}'


def finite_number(where: str, value: Any, name: str, hint: str = "") -> float:
    """``value`` as a float.

    Args:
        where: the record's place.
        value: the value.
        name: what the message calls it.
        hint: the end of the message.

    Raises:
        BadExample: it is no number, NaN, or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadExample(where, f"{name} must be a number, not {type_name(value)}{hint}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadExample(where, f"{name} must be a finite number, not {number}{hint}")
    return number

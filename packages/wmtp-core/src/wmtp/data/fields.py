"""Takes values out of a record, each checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from wmtp.data.base import BadExample

__all__ = ["bool_field", "finite_number", "name_field", "number_field", "text_field", "type_name"]


_TYPE_NAMES: Final = {
    list: "a list",
    dict: "an object",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def type_name(value: Any) -> str:
    """Name a value's type for an error message."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def text_field(where: str, record: Mapping[str, Any], key: str) -> str:
    r"""Return the string under ``key``, with ``\n`` at every line's end.

    Raises:
        BadExample: it is missing or no string.
    """
    if key not in record:
        raise BadExample(where, f'no "{key}"; the keys here are {", ".join(sorted(map(str, record))) or "none"}')
    value = record[key]
    if not isinstance(value, str):
        raise BadExample(where, f'"{key}" must be a string, not {type_name(value)}')
    return value.replace("\r\n", "\n")


def name_field(where: str, record: Mapping[str, Any], key: str) -> str:
    """Read the string or whole number under ``key`` as a string; empty where it is missing or null.

    Raises:
        BadExample: it is something else.
    """
    value = record.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadExample(where, f'"{key}" must be a string or a whole number, not {type_name(value)}')
    return str(value)


def bool_field(where: str, record: Mapping[str, Any], key: str) -> bool | None:
    """Return the boolean under ``key``; None where it is missing or null.

    Raises:
        BadExample: it is something else.
    """
    value = record.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadExample(where, f'"{key}" must be true or false, not {type_name(value)}')
    return value


def number_field(where: str, record: Mapping[str, Any], key: str) -> float | None:
    """Return the finite number under ``key``; None where it is missing or null.

    Raises:
        BadExample: it is something else.
    """
    value = record.get(key)
    return None if value is None else finite_number(where, value, f'"{key}"')


def finite_number(where: str, value: Any, name: str) -> float:
    """``value`` as a float.

    Raises:
        BadExample: it is no number, NaN, or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadExample(where, f"{name} must be a number, not {type_name(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadExample(where, f"{name} must be a finite number, not {number}")
    return number

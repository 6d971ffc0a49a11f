"""Plain data as JSON, between a solution and its tests.

`child` loads this within a sandbox, so it uses the standard library alone.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from typing import Any

_COLLECTIONS = ((list, "l"), (tuple, "t"), (set, "e"), (frozenset, "z"))
_MUTABLE: dict[str, Any] = {"l": list, "e": set, "d": dict, "a": bytearray}
_PLAIN = (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)
_ASKED = ("__eq__", "__ne__", "__lt__", "__gt__", "__hash__", "__bool__", "__len__", "__iter__", "__contains__", "__getitem__")


class Known:
    """Mutable containers of one call, numbered as both sides meet them."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._numbers: dict[int, int] = {}

    def add(self, container: Any) -> None:
        """Give it the next number."""
        self._numbers[id(container)] = len(self.all)
        self.all.append(container)

    def number(self, container: Any) -> int | None:
        """Return its number; None for a new one."""
        return self._numbers.get(id(container))


def encode(value: Any, refs: list[Any], known: Known, depth: int = 0) -> Any:
    """Encode plain data for JSON, and other objects by their number.

    Those stay here: only the number goes out.
    """
    if depth > 200:
        raise ValueError("too deep")
    if value is None or value is True or value is False:
        return value
    if _is_plain(type(value)) and (plain := _encode_plain(value, refs, known, depth)) is not None:
        return plain
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return {"y": value.__name__}
    for number, earlier in enumerate(refs):
        if earlier is value:
            return {"r": number}
    refs.append(value)
    return {"r": len(refs) - 1}


def _is_plain(kind: type) -> bool:
    """Tell whether an object's data says all that a test may ask.

    What it equals, how long it is, what is in it.
    """
    if kind.__module__.partition(".")[0] in sys.stdlib_module_names:
        return True
    base = next((base for base in _PLAIN if issubclass(kind, base)), object)
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in _ASKED)


def _encode_plain(value: Any, refs: list[Any], known: Known, depth: int) -> Any:
    if isinstance(value, int):
        return {"i": hex(int(value))}
    if isinstance(value, float):
        return {"f": float.hex(float(value))}
    if isinstance(value, complex):
        return {"c": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, str):
        return {"s": str.__str__(value).encode("utf-8", "surrogatepass").hex()}
    if isinstance(value, bytes):
        return {"b": bytes(value).hex()}
    if isinstance(value, (list, set, dict, bytearray)):
        if (number := known.number(value)) is not None:
            return {"k": number}
        known.add(value)
    if isinstance(value, (list, tuple, set, frozenset, dict, bytearray)):
        return contents(value, refs, known, depth)
    return None


def contents(value: Any, refs: list[Any], known: Known, depth: int = 0) -> Any:
    """Encode what a container holds, whether or not it is known."""
    if isinstance(value, bytearray):
        return {"a": bytes(value).hex()}
    if isinstance(value, dict):
        return {"d": [[encode(k, refs, known, depth + 1), encode(v, refs, known, depth + 1)] for k, v in dict.items(value)]}
    kind, name = next((kind, name) for kind, name in _COLLECTIONS if isinstance(value, kind))
    iterate: Any = kind.__iter__  # not what a subclass makes of it
    return {name: [encode(element, refs, known, depth + 1) for element in iterate(value)]}


def decode(value: Any, refs: Callable[[int], Any], known: Known) -> Any:
    """Reverse `encode`; ``refs`` maps a number to its object."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "r":
        return refs(content)
    if kind == "k":
        return known.all[content]
    if kind == "y":
        found = vars(builtins)[content]
        if not isinstance(found, type):
            raise ValueError(content)
        return found
    if kind == "i":
        return int(content, 16)
    if kind == "f":
        return float.fromhex(content)
    if kind == "c":
        return complex(*map(float.fromhex, content))
    if kind == "s":
        return bytes.fromhex(content).decode("utf-8", "surrogatepass")
    if kind == "b":
        return bytes.fromhex(content)
    if kind in _MUTABLE:
        made: Any = _MUTABLE[kind]()
        known.add(made)
        fill(made, value, refs, known)
        return made
    return {"t": tuple, "z": frozenset}[kind](decode(element, refs, known) for element in content)


def fill(container: Any, value: Any, refs: Callable[[int], Any], known: Known) -> None:
    """Replace what a container holds by the result of `contents`."""
    name = next(name for name, kind in _MUTABLE.items() if isinstance(container, kind))
    if name == "a":
        new: Any = bytes.fromhex(value[name])
    elif name == "d":
        new = {decode(k, refs, known): decode(v, refs, known) for k, v in value[name]}
    else:
        new = [decode(element, refs, known) for element in value[name]]
    container.clear()
    (container.extend if name in ("l", "a") else container.update)(new)

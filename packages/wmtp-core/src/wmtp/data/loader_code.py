"""Code of a data loader, as a part of its tokens' key."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Final

__all__ = ["loader_code"]

_SIMPLE: Final = (str, bytes, int, float, complex, type(None))


def loader_code(cls: type) -> bytes:
    """Return what identifies the code of a loader's class.

    That is its file. A class of an interactive session, as of a notebook, has none: then its own functions count, and what
    they name in that session: other functions and classes, numbers, texts and collections of these.
    """
    try:
        return Path(inspect.getfile(cls)).read_bytes()
    except (TypeError, OSError):
        return "\n".join(_described(cls, cls.__module__, set())).encode("utf-8", "surrogatepass")


def _described(value: Any, module: str, seen: set[int]) -> Iterator[str]:
    if isinstance(value, CodeType):
        yield f"{value.co_code.hex()} {value.co_names}"
        for constant in value.co_consts:
            yield from _described(constant, module, seen)
    elif _is_simple(value):
        yield repr(sorted(value, key=repr) if isinstance(value, set | frozenset) else value)
    elif id(value) not in seen and getattr(value, "__module__", module) == module:
        seen.add(id(value))
        if isinstance(value, type):
            for owner in value.__mro__:
                for name, member in vars(owner).items() if owner.__module__ == module else ():
                    yield name
                    yield from _described(member, module, seen)
        elif isinstance(value, FunctionType):
            yield from _described(value.__code__, module, seen)
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            named = [value.__globals__.get(name) for name in _names(value.__code__)]
            for used in (value.__defaults__, value.__kwdefaults__, *cells, *named):
                yield from _described(used, module, seen)
        else:
            for inside in _inside(value):
                yield from _described(inside, module, seen)


def _inside(value: object) -> tuple[object, ...]:
    """List what a member of a class wraps."""
    if isinstance(value, property):
        return (value.fget,)
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    return (value.func,) if isinstance(value, cached_property) else ()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_simple(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_simple(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_simple, value))
    return isinstance(value, _SIMPLE)

"""Places of WMTP's own keys, for one in a wrong table."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Final, get_args

import attrs

from wmtp.plugins.components import COMPONENT_KIND

__all__ = ["own_places"]

_MOST: Final = 3  # a name that more tables have says nothing


def own_places(name: str) -> list[str]:
    """List the dotted keys of this name in all tables.

    Empty where there are too many to help.
    """
    places = _places().get(name, [])
    return places if len(places) <= _MOST else []


@functools.cache
def _places() -> Mapping[str, list[str]]:
    from wmtp.config.schema import Config  # it is read by what this module serves

    found: dict[str, list[str]] = {}
    for path in _walk(Config, ""):
        found.setdefault(path.rpartition(".")[2], []).append(path)
    return found


def _walk(cls: type[Any], prefix: str) -> Iterator[str]:
    attrs.resolve_types(cls)
    for field in attrs.fields(cls):
        path = f"{prefix}{field.alias}"
        if field.metadata.get(COMPONENT_KIND) is None:  # a component's keys are its plugin's
            yield path
            if (inner := _table(field.type)) is not None:
                yield from _walk(inner, f"{path}.base." if path == "models" else f"{path}.")


def _table(annotation: Any) -> type[Any] | None:
    """Find the table's class in an annotation.

    That is the annotation itself, what is optional, or the value of a mapping.
    """
    parts = (annotation, *get_args(annotation))
    return next((part for part in parts if isinstance(part, type) and attrs.has(part)), None)

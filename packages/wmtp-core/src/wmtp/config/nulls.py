"""None in tables whose keys are not WMTP's own.

There it would be a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs

from wmtp.config.model_schema import ModelConfig
from wmtp.config.problems import KeyPath, Problem
from wmtp.config.schema import Config

__all__ = ["lost_nulls"]


def lost_nulls(config: Config, keys: Iterable[KeyPath]) -> Iterator[Problem]:
    """Report keys of None that TOML could not record.

    They are in tables such as a model's options.

    Args:
        config: as read.
        keys: of None in the sources, where it took no earlier value away. In a table of WMTP's own it means the default.
    """
    for path in sorted(keys, key=str):
        # a whole model or dataset of None that is not there is none
        if len(path) > 2 and isinstance(table := _at(config, path[:-1]), Mapping) and path[-1] not in table:
            yield Problem(
                path,
                "None is no value in a config, because TOML has no null; it takes away what an earlier source says, and none "
                "does: leave the key out, or give a value",
            )


def _at(value: Any, path: KeyPath) -> Any:
    """Find what stands at a key; None where there is nothing."""
    for key in path:
        if isinstance(value, ModelConfig) and key not in {field.alias for field in attrs.fields(ModelConfig)}:
            value = value.loader
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list | tuple):
            value = value[key] if isinstance(key, int) and key < len(value) else None
        elif attrs.has(type(value)):
            names = {str(field.alias): field.name for field in attrs.fields(type(value))}
            value = getattr(value, names[str(key)], None) if str(key) in names else None
        else:
            return None
    return value

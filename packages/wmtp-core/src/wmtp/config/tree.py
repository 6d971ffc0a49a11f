"""A config as plain data: for snapshots, trackers and comparisons."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from wmtp.config.problems import KeyPath, dotted
from wmtp.config.schema import Config, ModelConfig, StorageConfig
from wmtp.errors import ConfigError
from wmtp.plugins.components import COMPONENT_KIND
from wmtp.public import public

__all__ = ["Placed", "components", "dump_config", "flat", "flatten", "plain_value", "to_mapping"]


@attrs.frozen
class Placed:
    """A component, with its place in the config.

    Args:
        path: its table.
        kind: a key of `wmtp.plugins.components.KINDS`.
        config: the instance of its config class.
    """

    path: KeyPath
    kind: str
    config: Any


def components(config: Any, path: KeyPath = ()) -> Iterator[Placed]:
    """Every component in a config, those inside other components too."""
    for attribute in attrs.fields(type(config)):
        value = getattr(config, attribute.name)
        kind = attribute.metadata.get(COMPONENT_KIND)
        # the keys of a model's loader are in the model's own table
        here = path if isinstance(config, ModelConfig) and attribute.name == "loader" else (*path, str(attribute.alias))
        if isinstance(config, StorageConfig) and attribute.name == "backends":
            here, value = path, {backend.type: backend for backend in value}
        yield from _inside(value, here, kind)


def _inside(value: Any, path: KeyPath, kind: str | None) -> Iterator[Placed]:
    if isinstance(value, Mapping):
        for key, element in value.items():
            yield from _inside(element, (*path, key), kind)
    elif isinstance(value, tuple | list):
        for index, element in enumerate(value):
            yield from _inside(element, (*path, index), kind)
    elif attrs.has(type(value)):
        if kind is not None:
            yield Placed(path, kind, value)
        yield from components(value, path)


def to_mapping(config: Config, *, text: Callable[[str], str] = str) -> dict[str, Any]:
    """Convert the config to TOML tables, with all defaults.

    None becomes an absent key.

    Args:
        config: a config.
        text: applied to every string.

    Raises:
        ConfigError: a value has no form in TOML; the message names its key.
    """
    return _table(config, (), text)


def _table(config: Any, path: KeyPath, text: Callable[[str], str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for attribute in attrs.fields(type(config)):
        value = getattr(config, attribute.name)
        if not attribute.init:
            continue
        here = (*path, str(attribute.alias))
        if value is None:
            if attribute.default is not None and attribute.default is not attrs.NOTHING:
                raise ConfigError(f"{dotted(here)}: None cannot be written to TOML, because the default is another value")
            continue
        is_component = COMPONENT_KIND in attribute.metadata
        if isinstance(config, ModelConfig) and attribute.name == "loader":
            table.update(_value(value, path, text, is_component))
        elif isinstance(config, StorageConfig) and attribute.name == "backends":
            # the table's name is the backend's type
            table.update({backend.type: _table(backend, (*path, backend.type), text) for backend in value})
        else:
            table[str(attribute.alias)] = _value(value, here, text, is_component)
    return table


def plain_value(value: Any, *, is_component: bool = False) -> Any:
    """One value as TOML has it.

    Raises:
        ConfigError: it has no form in TOML.
    """
    return _value(value, (), str, is_component)


def _value(value: Any, path: KeyPath, text: Callable[[str], str], is_component: bool = False) -> Any:
    if isinstance(value, enum.Enum):
        return _value(value.value, path, text)
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Path):
        return text(str(value))
    if isinstance(value, Mapping):
        return {str(key): _value(element, (*path, key), text, is_component) for key, element in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        elements = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [_value(element, (*path, index), text, is_component) for index, element in enumerate(elements)]
    if attrs.has(type(value)) and not isinstance(value, type):
        if not is_component:
            return _table(value, path, text)
        type_ = getattr(type(value), "type", None)
        if isinstance(type_, str):
            return {"type": type_, **_table(value, path, text)}
    raise ConfigError(f"{dotted(path)}: {value!r:.60} ({type(value).__name__}) cannot be written to TOML")


@public
def dump_config(config: Config) -> str:
    """Write the config as complete TOML; reading it gives an equal config.

    Raises:
        ConfigError: a value has no form in TOML; the message names its key.
    """
    import tomli_w

    from wmtp.config.sources import escape

    return tomli_w.dumps(to_mapping(config, text=escape))


@public
def flatten(config: Config) -> dict[str, str]:
    """Flatten the config to one entry a value, section by section.

    Example: ``{"optimizer.lr": "1e-05", …}``.
    """
    return {key: _word(value) for key, value in flat(to_mapping(config)).items()}


def flat(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested tables to one, with dotted keys.

    Arrays of plain values stay whole.
    """
    values: dict[str, Any] = {}

    def walk(value: Any, path: KeyPath) -> None:
        if isinstance(value, Mapping) and value:
            for key, element in value.items():
                walk(element, (*path, key))
        elif isinstance(value, list) and any(isinstance(element, Mapping) for element in value):
            for index, element in enumerate(value):
                walk(element, (*path, index))
        else:
            values[dotted(path)] = value

    walk(mapping, ())
    return values


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_word(element) for element in value)}]"
    return "{}" if value == {} else str(value)

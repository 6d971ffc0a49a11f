"""Documentation of components, as ``wmtp show`` prints it."""

from __future__ import annotations

import inspect
import types
from typing import Any, Final, Literal, Union, get_args, get_origin

import attrs
import tomli_w

from wmtp.config.tree import plain_value
from wmtp.errors import ConfigError
from wmtp.plugins import load_plugins
from wmtp.plugins.components import COMPONENT_KIND, KINDS
from wmtp.plugins.registry import Provided, Registry
from wmtp.public import public
from wmtp.spelling import did_you_mean

__all__ = ["show", "type_name"]

#: where a component of each kind stands in TOML
_TABLES: Final = {
    "trainers": "[trainer]",
    "model_loaders": "[models.base]",
    "tokenizers": "[tokenizer]",
    "data_loaders": "[datasets.NAME]",
    "optimizers": "[optimizer]",
    "trackers": "[tracker]",
    "evaluators": "[[eval]]",
    "launchers": "[launcher]",
    "storages": "[storage.TYPE]",
}


@public
def show(name: str) -> list[dict[str, Any]]:
    """Describe the components of this name, as ``wmtp show`` does.

    Returns:
        for each its ``kind``, ``type``, ``distribution``, ``version``, ``documentation``, ``toml``, and all as one ``text``.

    Raises:
        ConfigError: no plugin provides one.
    """
    registry = load_plugins()
    found = registry.named(name)
    if not found:
        raise _unknown(name, registry)
    return [_describe(provided) for provided in found]


def _describe(provided: Provided) -> dict[str, Any]:
    """Describe a component: its kind, who provides it, and its TOML."""
    kind = KINDS[provided.kind]
    toml = _toml(provided)
    documentation = inspect.cleandoc(provided.cls.__doc__ or "Without documentation.")
    title = f"{provided.type}: {'an' if kind[0] in 'aeiou' else 'a'} {kind}, from {provided.plugin}"
    return {
        "kind": provided.kind,
        "type": provided.type,
        "distribution": provided.plugin.distribution if provided.plugin is not None else None,
        "version": provided.plugin.version if provided.plugin is not None else None,
        "documentation": documentation,
        "toml": toml,
        "text": f"{title}\n\n{documentation}\n\n{toml}",
    }


def _unknown(name: str, registry: Registry) -> ConfigError:
    """Make the error for a name that no component has."""
    names = sorted({provided.type for provided in registry.components})
    hint = did_you_mean(name, names) or f"installed: {', '.join(names)}"
    remedies = list(dict.fromkeys(registry.remedy(kind, name) for kind in KINDS))
    return ConfigError(f"no plugin provides '{name}'; {hint}{max(remedies, key=len)}")


def _toml(provided: Provided) -> str:
    table = _TABLES[provided.kind].replace("TYPE", provided.type)
    attrs.resolve_types(provided.cls)
    lines = [table, f'type = "{provided.type}"']
    if provided.kind == "storages":
        schemes = ", ".join(f"{scheme}://" for scheme in provided.cls.schemes)
        lines = [f"# it serves the URIs {schemes}", table]
        if not any(attribute.init for attribute in attrs.fields(provided.cls)):
            return f"# nothing to configure: it serves the URIs {schemes}"
    tables: list[str] = []
    for attribute in attrs.fields(provided.cls):
        if not attribute.init:
            continue
        key, default = str(attribute.alias), attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = None if default.takes_self else default.factory()  # type: ignore[union-attr]
        kind = attribute.metadata.get(COMPONENT_KIND)
        wanted = f"a {KINDS[kind]}" if kind is not None else type_name(attribute.type)
        if default is attrs.NOTHING and kind is not None:
            tables += [f"[{table.strip('[]')}.{key}]", f"type = …  # required: {wanted}"]
        elif default is attrs.NOTHING:
            lines.append(f"{key} = …  # required: {wanted}")
        elif default is None:
            lines.append(f"# {key} = …  # {wanted}")
        else:
            value = plain_value(default, is_component=kind is not None)
            if isinstance(value, dict):
                tables.append(f"# [{table.strip('[]')}.{key}]  # {wanted}")
                tables += [f"# {line}" for line in tomli_w.dumps(value).splitlines()]
            else:
                line = tomli_w.dumps({key: value}).strip()
                if isinstance(value, list):  # tomli_w gives every element a line
                    line = " ".join(line.split()).replace("[ ", "[").replace(", ]", "]")
                choices = f"  # {wanted}" if get_origin(attribute.type) is Literal else ""
                lines.append(line + choices)
    return "\n".join([*lines, *tables])


def type_name(type_: Any) -> str:
    """Name the type of a config field for a person."""
    if get_origin(type_) is Literal:
        return " or ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in get_args(type_))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    if type_ in words:
        return words[type_]
    arguments = [argument for argument in get_args(type_) if argument is not type(None)]
    if get_origin(type_) in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    origin = get_origin(type_) or type_
    if isinstance(origin, type) and issubclass(origin, tuple | list | set | frozenset):
        return "an array"
    return "a table" if isinstance(origin, type) and (attrs.has(origin) or hasattr(origin, "keys")) else str(type_)

"""Reads plain mappings into config classes, strictly.

cattrs chooses the hook for each type; the hooks here replace its lenient ones (it turns 3.7 into 3 and "false" into True),
know components, and gather every problem instead of stopping at the first.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
from collections.abc import Collection, Iterable, Mapping, MutableMapping, MutableSequence, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

import attrs
import cattrs
from cattrs.errors import StructureHandlerNotFoundError

from wmtp.config import values
from wmtp.config.problems import KeyPath, Problem, Problems, unknown_key
from wmtp.config.schema import ModelConfig, StorageConfig
from wmtp.plugins.components import COMPONENT_KIND, DEFAULT_TYPE, KINDS, OWN_TABLES
from wmtp.plugins.registry import Registry

__all__ = ["make_converter"]

_MISSING: Any = object()
_SEQUENCES = (list, tuple, set, frozenset, Sequence, MutableSequence, Collection, Iterable, Set)
_MAPPINGS = (dict, Mapping, MutableMapping)


@attrs.frozen
class _Kind:
    """Marks a type as a component, read with the plugins' help.

    Args:
        kind: a key of `KINDS`.
        default_type: what a table without ``type`` is; None where it must say.
    """

    kind: str
    default_type: str | None = None


def make_converter(registry: Registry) -> cattrs.Converter:
    """Make the converter for one set of plugins. Its ``structure`` raises `Problems`."""
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for scalar, name in ((bool, "true or false"), (int, "a whole number"), (str, "a string")):
        converter.register_structure_hook(scalar, values.scalar(scalar, name))
    converter.register_structure_hook(float, values.number)
    converter.register_structure_hook(Path, lambda value, _: Path(values.scalar(str, "a path")(value, str)))
    converter.register_structure_hook_func(lambda t: t is Any or t is object, lambda value, _: value)
    converter.register_structure_hook_func(lambda t: get_origin(t) is Literal, values.literal)
    converter.register_structure_hook_func(lambda t: isinstance(t, type) and issubclass(t, enum.Enum), values.enum_member)
    converter.register_structure_hook_func(_is_union, lambda value, t: _union(converter, value, t))
    converter.register_structure_hook_func(
        lambda t: (get_origin(t) or t) in _SEQUENCES, lambda value, t: _sequence(converter, value, t)
    )
    converter.register_structure_hook_func(
        lambda t: (get_origin(t) or t) in _MAPPINGS, lambda value, t: _mapping(converter, value, t)
    )
    converter.register_structure_hook_func(
        lambda t: attrs.has(get_origin(t) or t) and isinstance(get_origin(t) or t, type),
        lambda value, t: _table(converter, value, get_origin(t) or t),
    )
    converter.register_structure_hook_func(lambda t: dataclasses.is_dataclass(t) or is_typeddict(t), _unsupported)
    converter.register_structure_hook_func(
        lambda t: t is ModelConfig, lambda value, _: _model(converter, value)
    )  # the hook registered last wins
    converter.register_structure_hook_func(lambda t: t is StorageConfig, lambda value, _: _storage(converter, registry, value))
    converter.register_structure_hook_func(_is_component, lambda value, t: _component(converter, registry, value, t))
    return converter


def _unsupported(_: Any, type_: Any) -> Any:
    raise StructureHandlerNotFoundError("no attrs class", type_)


def _is_union(type_: Any) -> bool:
    return get_origin(type_) is Union or isinstance(type_, types.UnionType)


def _union(converter: cattrs.Converter, value: Any, type_: Any) -> Any:
    """Convert to the first member that takes the value unchanged.

    ``int`` comes before ``float``.
    """
    members = get_args(type_)
    if value is None and type(None) in members:
        return None
    members = sorted((m for m in members if m is not type(None)), key=lambda m: m is float)
    failures: list[Problems] = []
    for member in members:
        try:
            return converter.structure(value, member)
        except Problems as problems:
            failures.append(problems)
    deepest = max(failures, key=lambda f: max(len(p.path) for p in f.problems))
    if len(failures) == 1 or any(problem.path for problem in deepest.problems):
        raise deepest
    messages = list(dict.fromkeys(failure.problems[0].message for failure in failures))
    expected = [match[1] for message in messages if (match := re.fullmatch(r"must be (.+?), not .*", message, re.DOTALL))]
    if len(expected) == len(messages):
        raise values.wrong(" or ".join(expected), value)
    raise Problems.one(" or ".join(messages))


def _items(converter: cattrs.Converter, parts: Iterable[tuple[str | int, Any, Any]]) -> list[Any]:
    """Read several values, and raise what is wrong with any of them."""
    done: list[Any] = []
    problems: list[Problem] = []
    for key, value, type_ in parts:
        try:
            done.append(_read(converter, value, type_))
        except Problems as found:
            problems += (problem.under(key) for problem in found.problems)
    if problems:
        raise Problems(problems)
    return done


def _read(converter: cattrs.Converter, value: Any, type_: Any) -> Any:
    try:
        return converter.structure(value, type_)
    except Problems:
        raise
    except (StructureHandlerNotFoundError, cattrs.BaseValidationError):
        raise Problems.one(
            f"its class says {type_}, which cannot be read from TOML; use plain types and attrs classes"
        ) from None
    except Exception as error:
        raise Problems.one(values.message_of(error)) from None


def _sequence(converter: cattrs.Converter, value: Any, type_: Any) -> Any:
    origin, arguments = get_origin(type_) or type_, get_args(type_)
    if not isinstance(value, list | tuple | set | frozenset):
        raise values.wrong("an array", value)
    fixed = origin is tuple and arguments and arguments[-1] is not Ellipsis
    if fixed and len(value) != len(arguments):
        raise Problems.one(f"must have {len(arguments)} elements, not {len(value)}")
    element_types = arguments if fixed else [arguments[0] if arguments else Any] * len(value)
    ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    elements = _items(converter, zip(range(len(value)), ordered, element_types, strict=True))
    if origin in (set, frozenset, Set):
        return (set if origin is set else frozenset)(elements)
    return elements if origin in (list, MutableSequence) else tuple(elements)


def _mapping(converter: cattrs.Converter, value: Any, type_: Any) -> dict[Any, Any]:
    arguments = get_args(type_)
    table = _as_table(value)
    element = arguments[1] if arguments else Any
    return dict(zip(table, _items(converter, ((key, table[key], element) for key in table)), strict=True))


def _as_table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise values.wrong("a table", value)
    if wrong := [key for key in value if not isinstance(key, str)]:
        raise Problems.one(f"the key {wrong[0]!r} is no string")
    return value


def _table(converter: cattrs.Converter, value: Any, cls: type[Any]) -> Any:
    """Read a table into an attrs class.

    Unknown and missing keys are refused, every value is checked, and the class's own validators run.
    """
    attrs.resolve_types(cls)
    fields = {str(a.alias): a for a in attrs.fields(cls) if a.init}
    if not isinstance(value, Mapping):
        raise Problems.one(f"must be a table, not {values.shown(value)}; its keys: {', '.join(fields)}")
    table = _as_table(value)
    former: Mapping[str, str] = getattr(cls, "former_keys", {})
    problems = [Problem((key,), former.get(key) or unknown_key(key, fields)) for key in table if key not in fields]
    arguments: dict[str, Any] = {}
    for key, attribute in fields.items():
        if key not in table:
            if attribute.default is attrs.NOTHING:
                problems.append(Problem((key,), "required, and missing", at=()))
            continue
        try:
            arguments[key] = _read(converter, table[key], _field_type(attribute))
        except Problems as found:
            problems += (problem.under(key) for problem in found.problems)
    if not problems:
        try:
            return cls(**arguments)
        except Exception as error:
            raise Problems(_validator_problems(cls, fields, arguments) or [Problem((), values.message_of(error))]) from error
    # What can be validated already is, so that all problems show at once.
    raise Problems(problems + [p for p in _validator_problems(cls, fields, arguments) if p.path[0] in arguments])


def _validator_problems(
    cls: type[Any], fields: Mapping[str, attrs.Attribute[Any]], arguments: Mapping[str, Any]
) -> list[Problem]:
    """Run each field's validator, and collect all problems.

    attrs itself stops at the first.
    """
    unfinished = object.__new__(cls)
    known: dict[str, Any] = {}
    for key, attribute in fields.items():
        try:
            value = arguments[key] if key in arguments else _default(attribute, unfinished)
            if value is _MISSING:
                continue
            if attribute.converter is not None and not isinstance(attribute.converter, attrs.Converter):
                value = attribute.converter(value)
        except Exception:
            continue
        object.__setattr__(unfinished, attribute.name, value)
        known[key] = value
    problems: list[Problem] = []
    for key, value in known.items():
        if key in arguments and fields[key].validator is not None:
            try:
                fields[key].validator(unfinished, fields[key], value)  # type: ignore[misc]
            except AttributeError:
                continue  # it looks at a field that is itself wrong or missing
            except Exception as error:
                problems.append(Problem((key,), values.message_of(error, fields[key].name)))
    return problems


def _default(attribute: attrs.Attribute[Any], instance: Any) -> Any:
    if attribute.default is attrs.NOTHING:
        return _MISSING
    if isinstance(attribute.default, attrs.Factory):  # type: ignore[arg-type]
        factory: Any = attribute.default
        return factory.factory(instance) if factory.takes_self else factory.factory()
    return attribute.default


def _field_type(attribute: attrs.Attribute[Any]) -> Any:
    kind = attribute.metadata.get(COMPONENT_KIND)
    if kind is None:
        return attribute.type if attribute.type is not None else Any
    return _with_component(attribute.type, Annotated[Any, _Kind(kind, attribute.metadata.get(DEFAULT_TYPE))])


def _with_component(annotation: Any, leaf: Any) -> Any:
    """Replace the component class inside a field's annotation by `leaf`."""
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if _is_union(annotation) and type(None) in arguments:
        rest = [argument for argument in arguments if argument is not type(None)]
        return _with_component(rest[0], leaf) | None
    if origin in _MAPPINGS:
        return Mapping[str, leaf]
    if origin in _SEQUENCES:
        return list[leaf] if origin is list else tuple[leaf, ...]
    return leaf


def _is_component(type_: Any) -> bool:
    return get_origin(type_) is Annotated and any(isinstance(mark, _Kind) for mark in type_.__metadata__)


def _component(converter: cattrs.Converter, registry: Registry, value: Any, type_: Any) -> Any:
    mark: _Kind = next(mark for mark in type_.__metadata__ if isinstance(mark, _Kind))
    if isinstance(value, str):
        raise Problems.one(f'must be a table, not {values.shown(value)}; write {{ type = "{value}" }}')
    table = dict(_as_table(value))
    name = table.pop("type", mark.default_type)
    if name is None:
        names = ", ".join(provided.type for provided in registry.of_kind(mark.kind)) or "none is installed"
        raise Problems([Problem(("type",), f"required, and missing: which {KINDS[mark.kind]} it is; one of: {names}", at=())])
    if not isinstance(name, str):
        raise Problems([problem.under("type") for problem in values.wrong("a string", name).problems])
    provided = registry.find(mark.kind, name)
    if provided is None:
        at: KeyPath = ("type",) if "type" in value else ()
        raise Problems([Problem((), registry.missing(mark.kind, name), at=at)])
    return _read(converter, table, provided.cls)


def _model(converter: cattrs.Converter, value: Any) -> ModelConfig:
    """Read a table of ``[models]``.

    `OWN_TABLES` are WMTP's; every other key of the table belongs to the loader.
    """
    table = dict(_as_table(value))
    attrs.resolve_types(ModelConfig)
    types = {attribute.name: attribute.type for attribute in attrs.fields(ModelConfig)}
    own = {name: (table.pop(name), types[name]) for name in OWN_TABLES if name in table}
    parts: dict[str, tuple[Any, Any]] = {"loader": (table, Annotated[Any, _Kind("model_loaders")]), **own}
    problems: list[Problem] = []
    done: dict[str, Any] = {}
    for key, (part, type_) in parts.items():
        try:
            done[key] = _read(converter, part, type_)
        except Problems as found:
            problems += (problem if key == "loader" else problem.under(key) for problem in found.problems)
    if problems:
        raise Problems(problems)
    return ModelConfig(**done)


def _storage(converter: cattrs.Converter, registry: Registry, value: Any) -> StorageConfig:
    """Read ``[storage]``, where each backend has a table of its name."""
    table = dict(_as_table(value))
    names = [provided.type for provided in registry.of_kind("storages")]
    attrs.resolve_types(StorageConfig)
    own = {str(a.alias): a.type for a in attrs.fields(StorageConfig) if COMPONENT_KIND not in a.metadata}
    problems: list[Problem] = []
    plain: dict[str, Any] = {}
    backends: list[Any] = []
    for key, element in table.items():
        try:
            if key in own:
                plain[key] = _read(converter, element, own[key])
            elif registry.find("storages", key) is None:
                missing = f"{unknown_key(key, [*own, *names])}{registry.remedy('storages', key)}"
                raise Problems.one(missing)
            else:
                backends.append(_backend(converter, key, element))
        except Problems as found:
            problems += (problem.under(key) for problem in found.problems)
    if problems:
        raise Problems(problems)
    return StorageConfig(**plain, backends=tuple(backends))


def _backend(converter: cattrs.Converter, name: str, value: Any) -> Any:
    table = dict(_as_table(value))
    if table.setdefault("type", name) != name:
        raise Problems([Problem(("type",), f"{table['type']!r}, but the table is named '{name}'; remove this line")])
    return _read(converter, table, Annotated[Any, _Kind("storages")])

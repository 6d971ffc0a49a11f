"""Check of a config class before anything uses it.

At registration, in Python code without a plugin, and in the suites.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import attrs

from wmtp.plugins.components import KINDS, OWN_TABLES
from wmtp.plugins.contract import CONFIG_CLASSES, StorageBackendConfig

__all__ = ["contract_problem", "describe"]

_BUILD_ARGUMENTS = {"tokenizers": ("path",), "optimizers": ("parameters",)}  # of the others: none


def contract_problem(kind: str, cls: Any) -> str | None:
    """Describe how a config class breaks the contract, if it does.

    The contract is that of `wmtp.plugins.hookspecs`.

    Args:
        kind: a key of `wmtp.plugins.components.KINDS`.
        cls: what a hook returned, or what Python code uses without a plugin.
    """
    if not isinstance(cls, type):
        return f"must return config classes, not {describe(cls)}"
    if not attrs.has(cls):
        return f"{cls.__name__} is no attrs class; decorate it with @attrs.frozen(kw_only=True)"
    if getattr(cls.__setattr__, "__name__", "") != "_frozen_setattrs":
        return f"{cls.__name__} is not frozen; decorate it with @attrs.frozen(kw_only=True)"
    base = CONFIG_CLASSES[kind]
    if not issubclass(cls, base):
        return f"{cls.__name__} is no {base.__name__}; write class {cls.__name__}(wmtp.{base.__name__})"
    names = {a.alias or a.name for a in attrs.fields(cls)}
    if "type" in names:
        return f'{cls.__name__}.type is a field; write `type = "name"` without an annotation, or with ClassVar'
    type_ = getattr(cls, "type", None)
    if not isinstance(type_, str) or not type_.strip():
        return f'{cls.__name__} has no name: write `type = "my-{KINDS[kind].replace(" ", "-")}"` in it'
    if cls.build is base.build:  # type: ignore[attr-defined]
        return f"{cls.__name__} ('{type_}') has no method build()"
    if not _takes(cls, _BUILD_ARGUMENTS.get(kind, ())):
        arguments = ", ".join(("self", *_BUILD_ARGUMENTS.get(kind, ())))
        return f"{cls.__name__} ('{type_}'): build is called as build({arguments}), and takes something else"
    if problem := next(cls.contract_problems(), None):
        return f"{cls.__name__} ('{type_}'): {problem}"
    if kind == "model_loaders" and (taken := next((name for name in OWN_TABLES if name in names), None)):
        return f"{cls.__name__} ('{type_}') has a field '{taken}', which is WMTP's own in [models.base]"
    if issubclass(cls, StorageBackendConfig) and not cls.schemes:
        return f"{cls.__name__} ('{type_}') has no `schemes`, the URI schemes that it serves"
    if kind == "optimizers" and "lr" not in names:
        return f"{cls.__name__} ('{type_}') has no field 'lr', the peak learning rate that [schedule] scales"
    if untyped := [a.name for a in attrs.fields(cls) if a.init and a.type is None]:
        return f"{cls.__name__} ('{type_}'): the field '{untyped[0]}' has no type, so nothing could be checked; write one"
    try:
        attrs.resolve_types(cls)
    except Exception as error:
        return f"{cls.__name__} ('{type_}'): the types of its fields cannot be found: {error}"
    return None


def _takes(cls: type[Any], arguments: Sequence[str]) -> bool:
    """Tell whether ``build`` can be called with this number of arguments."""
    bound = isinstance(inspect.getattr_static(cls, "build"), staticmethod | classmethod)
    try:
        inspect.signature(cls.build).bind(*(() if bound else ("self",)), *arguments)
    except TypeError:
        return False
    except ValueError:  # a callable that does not tell
        return True
    return True


def describe(value: Any) -> str:
    """Describe a value in a message."""
    return f"the class {value.__name__} itself" if isinstance(value, type) else f"{value!r:.60} ({type(value).__name__})"

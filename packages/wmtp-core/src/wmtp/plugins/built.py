"""Validation of what plugins build, and of what components return."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeVar

from wmtp.errors import PluginError
from wmtp.plugins.components import KINDS
from wmtp.plugins.provenance import provenance

if TYPE_CHECKING:
    from wmtp.plugins.contract import ComponentConfig

__all__ = ["built", "returned", "typed"]

#: kind → module and name of what its config classes build; by name, because they are of the floors above
_BASES: Final = {
    "model_loaders": ("wmtp.models.base", "ModelLoader"),
    "tokenizers": ("wmtp.tokenizers.base", "Tokenizer"),
    "data_loaders": ("wmtp.data.base", "ExampleLoader"),
    "storages": ("wmtp.storage.base", "Storage"),
    "optimizers": ("torch.optim", "Optimizer"),
    "trackers": ("wmtp.tracking.base", "Tracker"),
    "evaluators": ("wmtp.evaluation.base", "Evaluator"),
    "launchers": ("wmtp.launchers.base", "Launcher"),
}
_T = TypeVar("_T")


def built(component: ComponentConfig, kind: str, *arguments: Any) -> Any:
    """Build a component, which must be what its kind is.

    Args:
        component: the config.
        kind: a key of `wmtp.plugins.components.KINDS`.
        arguments: of ``build``.

    Raises:
        PluginError: it is something else; the message names the plugin.
    """
    module, name = _BASES[kind]
    found = component.build(*arguments)  # type: ignore[attr-defined]
    return returned(component, kind, "build", getattr(import_module(module), name), found)


def returned(component: ComponentConfig, kind: str, method: str, base: type[_T], value: Any) -> _T:
    """Validate the type that a component's method returned; see `built`."""
    return value if _is(value, base) else typed(provenance(component, KINDS[kind]), method, base, value)


def _is(value: object, base: type) -> bool:
    """Tell whether a value is of a type.

    A text is no list of texts.
    """
    return isinstance(value, base) and not (isinstance(value, str) and base in (Iterable, Sequence))


def typed(name: str, method: str, base: type[_T], value: Any) -> _T:
    """Validate the type of a returned value.

    Raises:
        PluginError: it has another one; the message begins with ``name``.
    """
    if not _is(value, base):
        article = "an" if base.__name__[0] in "AEIOU" else "a"
        found = "None" if value is None else f"a {type(value).__name__}"
        raise PluginError(f"{name}: {method} returned {found}, not {article} {base.__name__}")
    return value

"""Marking of config fields that hold a plugin's component."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, runtime_checkable

import attrs

from wmtp.errors import ConfigError

__all__ = ["COMPONENT_KIND", "DEFAULT_TYPE", "KINDS", "OWN_TABLES", "Component", "component", "idle_keys"]

COMPONENT_KIND: Final = "wmtp_component_kind"
DEFAULT_TYPE: Final = "wmtp_default_type"

#: hook name → what one component of that kind is called in messages
KINDS: Final[dict[str, str]] = {
    "trainers": "trainer",
    "model_loaders": "model loader",
    "tokenizers": "tokenizer",
    "data_loaders": "data loader",
    "storages": "storage backend",
    "optimizers": "optimizer",
    "trackers": "tracker",
    "evaluators": "evaluator",
    "launchers": "launcher",
}

#: keys of ``[models.NAME]`` that are WMTP's own, beside those of the model loader
OWN_TABLES: Final = ("heads", "lora", "quantize")


@runtime_checkable
class Component(Protocol):
    """A plugin's config class: frozen attrs with ``type`` and ``build``.

    ``type`` is its name in TOML; ``build`` makes the component.
    """

    @property
    def type(self) -> str:
        """Name of the component in TOML."""
        ...

    @property
    def build(self) -> Callable[..., Any]:
        """Makes the component; `wmtp.plugins.hookspecs` says of each kind with which arguments."""
        ...


def component(kind: str, *, default_type: str | None = None, **options: Any) -> Any:
    """Declare an attrs field that holds one or more components.

    Several are a list or a mapping of them.

    Args:
        kind: a key of `KINDS`.
        default_type: the component's name in TOML where its table does not say. Without a table it has its defaults, unless
            ``options`` give a ``default``.
        options: of `attrs.field`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown component kind {kind!r}")
    if default_type is not None and "default" not in options:
        options["factory"] = lambda: _with_defaults(kind, default_type)
    return attrs.field(metadata={COMPONENT_KIND: kind, DEFAULT_TYPE: default_type}, **options)


def _with_defaults(kind: str, type_: str) -> Any:
    from wmtp.plugins.loader import load_plugins

    registry = load_plugins()
    found = registry.find(kind, type_)
    if found is None:
        raise ConfigError(registry.missing(kind, type_))
    return found.cls()


def idle_keys(config: Any, keys: tuple[str, ...], reason: str) -> Iterator[str]:
    """Name the changed keys that ``reason`` leaves without effect.

    A component's ``check()`` yields these lines, so that no setting is ignored in silence.

    Args:
        config: an instance of a config class.
        keys: its fields that have no effect now.
        reason: why, as in ``mode = "weighted" learns every prediction``.
    """
    for attribute in attrs.fields(type(config)):
        default: Any = attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        if attribute.name in keys and getattr(config, attribute.name) != default:
            yield f"{attribute.alias}: has no effect: {reason}; remove it"

"""From TOML to a frozen, checked `Config`, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmtp.config.load import load_config
    from wmtp.config.rules import check
    from wmtp.config.schema import Config
    from wmtp.config.tree import dump_config, flatten
    from wmtp.plugins.components import component

__all__ = ["Config", "check", "component", "dump_config", "flatten", "load_config"]

_HOMES = {
    "Config": "schema",
    "check": "rules",
    "component": "components",
    "dump_config": "tree",
    "flatten": "tree",
    "load_config": "load",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"wmtp.config.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""From TOML to a frozen, checked `Config`, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wmtp.lazy import lazy_names

if TYPE_CHECKING:
    from wmtp.config.load import load_config
    from wmtp.config.rules import check
    from wmtp.config.schema import Config
    from wmtp.config.tree import dump_config, flatten
    from wmtp.plugins.components import component

__all__ = ["Config", "check", "component", "dump_config", "flatten", "load_config"]

__getattr__ = lazy_names(
    __name__,
    {
        "Config": "wmtp.config.schema",
        "check": "wmtp.config.rules",
        "component": "wmtp.plugins.components",
        "dump_config": "wmtp.config.tree",
        "flatten": "wmtp.config.tree",
        "load_config": "wmtp.config.load",
    },
)

"""Names of components in messages."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from wmtp.plugins.loader import load_plugins

if TYPE_CHECKING:
    from wmtp.plugins.contract import ComponentConfig

__all__ = ["provenance"]


def provenance(component: ComponentConfig, kind: str = "trainer") -> str:
    """Name a component for messages: kind, type and provider."""
    plugin = load_plugins().provider(type(component))
    if plugin is not None:
        return f"{kind} '{component.type}' ({plugin})"
    module = type(component).__module__
    try:
        version = metadata.version(module.partition(".")[0])
    except metadata.PackageNotFoundError:
        return f"{kind} '{component.type}' ({module})"
    return f"{kind} '{component.type}' ({module} {version})"

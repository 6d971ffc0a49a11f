"""Plugin host: finds the components that installed packages provide."""

from wmtp.plugins.loader import load_plugins
from wmtp.plugins.registry import Plugin, Provided, Registry

__all__ = ["Plugin", "Provided", "Registry", "load_plugins"]

"""The storage backends of all plugins, with the options that a config gives them."""

from __future__ import annotations

from collections.abc import Mapping

from wmtp.config.schema import StorageConfig
from wmtp.plugins import Registry, load_plugins
from wmtp.storage.base import Storage

__all__ = ["build_backends"]


def build_backends(config: StorageConfig, registry: Registry | None = None) -> Mapping[str, Storage]:
    """Scheme → backend.

    Args:
        config: the section ``[storage]``; a backend without options there has its defaults.
        registry: the plugins; default: all that are installed.
    """
    given = {type(backend): backend for backend in config.backends}
    known = [provided.cls for provided in (registry if registry is not None else load_plugins()).of_kind("storages")]
    options = [given.get(cls) or cls() for cls in dict.fromkeys((*known, *given))]
    # a class that Python code uses without a plugin serves its schemes in place of the plugin's
    return {scheme: built for option in options for built in (option.build(),) for scheme in type(option).schemes}

"""The storage backends of all plugins, with the options that a config gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from wmtp.config.schema import StorageConfig
from wmtp.plugins import Registry, load_plugins
from wmtp.storage.base import Storage

__all__ = ["build_backends"]


def build_backends(config: StorageConfig, registry: Registry | None = None) -> Mapping[str, Storage]:
    """Scheme → backend. Each is built when it is asked for: their libraries take time to import.

    Args:
        config: the section ``[storage]``; a backend without options there has its defaults.
        registry: the plugins; default: all that are installed.
    """
    given = {type(backend): backend for backend in config.backends}
    known = [provided.cls for provided in (registry if registry is not None else load_plugins()).of_kind("storages")]
    # a class that Python code uses without a plugin serves its schemes in place of the plugin's
    options = [given[cls] if cls in given else cls() for cls in dict.fromkeys((*known, *given))]
    return _Backends({scheme: option for option in options for scheme in type(option).schemes})


class _Backends(Mapping[str, Storage]):
    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._built: dict[type[Any], Storage] = {}

    def __getitem__(self, scheme: str) -> Storage:
        option = self._options[scheme]
        if type(option) not in self._built:
            self._built[type(option)] = option.build()
        return self._built[type(option)]

    def __contains__(self, scheme: object) -> bool:
        return scheme in self._options

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

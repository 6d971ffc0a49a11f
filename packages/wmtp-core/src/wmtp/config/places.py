"""Resolution of a config's URIs, by the storage backends of plugins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from wmtp.config.schema import Config, StorageConfig
from wmtp.plugins import Registry, load_plugins
from wmtp.plugins.built import built
from wmtp.storage.base import Storage
from wmtp.storage.model_folders import LOADERS, localize_model
from wmtp.storage.uris import localize

__all__ = ["Place", "build_backends"]


@frozen(kw_only=True, eq=False)
class Place:
    """Resolves the URIs of a config.

    Args:
        backends: scheme → storage backend, of all installed plugins.
        cache_dir: where remote files are kept.
    """

    backends: Mapping[str, Storage]
    cache_dir: Path

    @classmethod
    def of(cls, config: Config) -> Place:
        """Build the storage backends of all plugins."""
        return cls(backends=build_backends(config.storage), cache_dir=Path(config.storage.cache_dir).expanduser())

    def path(self, component: Any, key: str) -> Path | None:
        """Return the local path of a component's ``uri``, if any.

        Raises:
            WMTPError: nothing is there, or it could not be fetched.
        """
        uri = component.uri
        if uri is not None and key.startswith("models.") and component.type in LOADERS:
            return localize_model(uri, self.backends, self.cache_dir, key=f"{key}.uri")
        return None if uri is None else self.fetch(uri, f"{key}.uri")

    def fetch(self, uri: str, key: str) -> Path:
        """Return the local path of a URI, fetching it if needed.

        Raises:
            WMTPError: nothing is there, or it could not be fetched.
        """
        return localize(uri, self.backends, self.cache_dir, key=key)


def build_backends(config: StorageConfig, registry: Registry | None = None) -> Mapping[str, Storage]:
    """Map schemes to backends.

    Each backend is built when it is asked for: their libraries take time to import.

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
            self._built[type(option)] = built(option, "storages")
        return self._built[type(option)]

    def __contains__(self, scheme: object) -> bool:
        return scheme in self._options

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

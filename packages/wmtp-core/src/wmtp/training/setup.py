"""From a checked config to the parts that the loop works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import nn

from wmtp.config.components import Component
from wmtp.config.schema import Config, ModelConfig
from wmtp.errors import ConfigError
from wmtp.models.base import ModelInfo
from wmtp.plugins import load_plugins
from wmtp.storage.uris import localize
from wmtp.tokenizers import Tokenizer

if TYPE_CHECKING:
    from wmtp.storage import Storage

__all__ = ["Place", "Source", "load_extra_model", "open_source", "provenance"]


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
        built = [provided.cls() for provided in load_plugins().of_kind("storages")]
        backends = {scheme: storage.build() for storage in built for scheme in storage.schemes}
        return cls(backends=backends, cache_dir=Path(config.storage.cache_dir).expanduser())

    def path(self, component: Any, key: str) -> Path | None:
        """The local path of a component's ``uri``; None where it has none.

        Raises:
            WMTPError: nothing is there, or it could not be fetched.
        """
        uri = getattr(component, "uri", None)
        return None if uri is None else localize(uri, self.backends, self.cache_dir, key=f"{key}.uri")


@frozen(kw_only=True, eq=False)
class Source:
    """What is known of model, tokenizer and data before any weight is read.

    Args:
        place: resolves URIs.
        model_path: the local path of the base model; None for one from scratch.
        model_info: its metadata.
        tokenizer: checked against the model's vocabulary.
        dataset_paths: the local path of each data set.
    """

    place: Place
    model_path: Path | None
    model_info: ModelInfo
    tokenizer: Tokenizer
    dataset_paths: Mapping[str, Path | None]


def open_source(config: Config) -> Source:
    """Find the files that a config names, and check what can be checked without reading weights.

    Raises:
        ConfigError: rows longer than the model's positions, or a tokenizer that is not the model's.
        WMTPError: files are missing or damaged.
    """
    from wmtp.models.vocabulary import check_vocabulary

    place = Place.of(config)
    base = config.models["base"]
    path = place.path(base.loader, "models.base")
    info = base.loader.build().info(path)
    longest = info.max_positions
    if longest is not None and config.data.train.max_length > longest:
        raise ConfigError(
            f"data.train.max_length: {config.data.train.max_length}, but the model has positions for {longest} tokens; "
            f"write at most {longest}"
        )
    tokenizer = _open_tokenizer(config, place, path)
    check_vocabulary(info.vocab_size, tokenizer)
    datasets = {name: place.path(dataset, f"datasets.{name}") for name, dataset in config.datasets.items()}
    return Source(place=place, model_path=path, model_info=info, tokenizer=tokenizer, dataset_paths=datasets)


def _open_tokenizer(config: Config, place: Place, model_path: Path | None) -> Tokenizer:
    """The tokenizer that the config names, or the one that lies beside the base model."""
    from wmtp.tokenizers.load import load_tokenizer

    if config.tokenizer is not None:
        own = place.path(config.tokenizer, "tokenizer")
        return config.tokenizer.build(model_path if own is None else own)
    if model_path is None:
        raise ConfigError("tokenizer: a model from scratch brings none; add the table [tokenizer]")
    return load_tokenizer(model_path)


def load_extra_model(config: Config, place: Place, device: torch.device) -> Callable[[str], nn.Module]:
    """What a trainer calls to load ``[models.NAME]``: frozen, in eval mode, on ``device``."""

    def load(name: str) -> nn.Module:
        entry: ModelConfig | None = config.models.get(name)
        if entry is None:
            raise ConfigError(f"models.{name}: the trainer needs this model; add the table [models.{name}]")
        loaded = entry.loader.build().load(
            place.path(entry.loader, f"models.{name}"), dtype=torch.float32, seed=config.run.seed
        )
        return loaded.model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]

    return load


def provenance(component: Component) -> str:
    """What messages call a component: its type and who provides it."""
    plugin = load_plugins().provider(type(component))
    if plugin is not None:
        return f"trainer '{component.type}' ({plugin})"
    module = type(component).__module__
    try:
        version = metadata.version(module.partition(".")[0])
    except metadata.PackageNotFoundError:
        return f"trainer '{component.type}' ({module})"
    return f"trainer '{component.type}' ({module} {version})"

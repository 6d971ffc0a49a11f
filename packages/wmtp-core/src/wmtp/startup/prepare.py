"""Fetching and checking of inputs, before a GPU waits for them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from attrs import evolve, frozen

from wmtp.config.problems import KeyPath, dotted
from wmtp.config.required_models import required_models
from wmtp.config.schema import Config, StorageConfig
from wmtp.config.tree import components
from wmtp.errors import FileError, WMTPError
from wmtp.json_files import DAMAGE, read_json_object
from wmtp.redaction import redact
from wmtp.storage.safetensors_header import parse_header
from wmtp.storage.uris import file_path, localize, scheme_of

__all__ = ["Fetch", "fetched", "needed", "verify"]

logger = logging.getLogger("wmtp")

#: these are on the machine or in the image already, or fetched by the run, which notes the commit that it takes of the hub
_LOCAL: Final = ("file", "package", "hf")
#: which folder takes what a section of the config names
_FOLDERS: Final = {"models": "models", "datasets": "datasets", "tokenizer": "models"}


@frozen(kw_only=True)
class Fetch:
    """One thing to fetch.

    Args:
        key: the config section that names it.
        uri: where it is.
        folder: where fetched things of its kind are kept.
    """

    key: str
    uri: str
    folder: Path


def needed(config: Config, home: Path) -> list[Fetch]:
    """List the inputs that are not on this machine.

    Args:
        config: complete.
        home: models go to ``models`` in it and data to ``datasets``, unless ``storage.cache_dir`` is a cache for both.
    """
    trained_with = ("base", *required_models(config))  # a cluster's file may name models that this trainer does not need
    own_cache = config.storage.cache_dir if config.storage.cache_dir != StorageConfig().cache_dir else None
    found = []
    for placed in components(config):
        uri = placed.config.uri
        if not isinstance(uri, str) or scheme_of(uri) in _LOCAL or placed.path[0] not in _FOLDERS:
            continue
        if placed.path[0] == "models" and placed.path[1] not in trained_with:
            continue
        folder = Path(own_cache).expanduser() if own_cache is not None else home / _FOLDERS[str(placed.path[0])]
        found.append(Fetch(key=dotted(placed.path), uri=uri, folder=folder))
    return found


def fetched(config: Config, wanted: Iterable[Fetch], home: Path) -> Config:
    """Fetch inputs; return the config with local paths for URIs.

    The training processes then fetch nothing.

    The paths are links in ``inputs``, relative to ``home`` and the same in every container, wherever the cache has the files: a
    run that goes on elsewhere has the config that it had.

    Raises:
        ConfigError: no plugin serves a URI.
        WMTPError: something is not there, or could not be read; what was fetched stays, and is not fetched again.
    """
    from wmtp.config.places import build_backends

    backends = build_backends(config.storage)
    paths: dict[str, Path] = {}
    for fetch in wanted:
        fetch.folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        there = localize(fetch.uri, backends, fetch.folder, key=f"{fetch.key}.uri")
        suffix = "".join(there.suffixes) if there.is_file() else ""  # by which a loader may know the format
        paths[fetch.key] = Path("inputs", f"{fetch.key}{suffix}")
        _link(home / paths[fetch.key], there)
        logger.info("%s: %s is at %s (%.1f s)", fetch.key, redact(fetch.uri), there, time.monotonic() - began)

    def local(path: KeyPath, component: Any) -> Any:
        if dotted(path) in paths:
            component = evolve(component, uri=str(paths[dotted(path)]))
        inside = {placed.path[len(path)]: placed for placed in components(component, path) if len(placed.path) == len(path) + 1}
        return evolve(component, **{str(key): local(placed.path, placed.config) for key, placed in inside.items()})

    models = {name: evolve(m, loader=local(("models", name), m.loader)) for name, m in config.models.items()}
    datasets = {name: local(("datasets", name), dataset) for name, dataset in config.datasets.items()}
    tokenizer = None if config.tokenizer is None else local(("tokenizer",), config.tokenizer)
    return evolve(config, models=models, datasets=datasets, tokenizer=tokenizer)


def _link(link: Path, target: Path) -> None:
    """Make a link, in place of an older one."""
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        draft.symlink_to(target.absolute())
        draft.replace(link)
    except OSError as error:
        raise WMTPError(f"{link}: the link to {target} could not be made: {error.strerror or error}") from None


def verify(config: Config) -> None:
    """Check model files before training.

    Whether the models' vocabularies fit each other is for the run, which compares their tokenizers before it reads a weight.

    Raises:
        WMTPError: a file is missing or cut short; the message names it.
    """
    checked = []
    for name in ("base", *required_models(config)):
        uri = config.models[name].loader.uri
        if isinstance(uri, str) and scheme_of(uri) == "file":
            _check_files(f"models.{name}", file_path(uri))
            checked.append(name)
    if checked:
        logger.info("models: %s whole", ", ".join(checked))


def _check_files(key: str, path: Path) -> None:
    for file in _files(key, path):
        if file.suffix == ".safetensors":
            _check_safetensors(key, file)
        elif file.stat().st_size == 0 and file.suffix in (".bin", ".pth", ".gguf", ".json", ".model"):
            raise WMTPError(f"{key}: {file} is empty; fetch it again")
        elif file.name in ("config.json", "params.json"):
            _read(key, file)


def _files(key: str, path: Path) -> Iterator[Path]:
    if not path.exists():
        raise WMTPError(f"{key}: {path} is not there")
    if path.is_file():
        yield path
        return
    yield from (file for file in sorted(path.iterdir()) if file.is_file())
    for index in sorted(path.glob("*.index.json")):
        for name in sorted(set(_read(key, index).get("weight_map", {}).values())):
            if not (path / str(name)).is_file():
                raise WMTPError(f"{key}: {path / str(name)} is not there, but {index.name} names it; the folder is not whole")


def _check_safetensors(key: str, file: Path) -> None:
    """Check that the file is as long as its header says."""
    try:
        with file.open("rb") as stream:
            parse_header(stream)
    except (OSError, *DAMAGE) as error:
        raise FileError(f"{key}: {file} is not whole: {error}; fetch it again") from None


def _read(key: str, file: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(file)
    except WMTPError as error:
        raise WMTPError(f"{key}: {error}") from None

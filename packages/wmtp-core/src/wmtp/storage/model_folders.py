"""Search for the model at a URI, before anything is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wmtp.errors import ConfigError
from wmtp.redaction import redact
from wmtp.storage import Storage
from wmtp.storage.model_files import ADAPTER_CONFIG
from wmtp.storage.uris import backend_for, localize, scheme_of, stored_files

__all__ = ["LOADERS", "localize_model", "model_within"]

#: the model loaders whose folders are known by the files below
LOADERS = ("hf", "meta-mtp")
_FILES = ("config.json", "params.json", ADAPTER_CONFIG)
_OF_RUN = "model/"  # in a run directory, and below a run's checkpoints.uri
_SHOWN = 5


def localize_model(uri: str, backends: Mapping[str, Storage], cache_dir: Path, *, key: str | None = None) -> Path:
    """Localize a model that `LOADERS` load.

    Of a run, wherever it is, that is the model that it saved.

    Raises:
        ConfigError: the folder holds no model; the message names folders in it that do.
        WMTPError: nothing is there, or it could not be read.
    """
    storage = backend_for(uri, backends, key=key)
    if scheme_of(uri) != "file" and type(storage).files is not Storage.files:  # else it cannot tell
        names = [file.name for file in stored_files(storage, uri)]
        beside = {name for name in names if "/" not in name}
        # a single file, or nothing at all, is for others to judge
        is_folder = bool(names) and beside != {uri.rstrip("/").rpartition("/")[2]}
        if is_folder and not any(map(_is_model_file, beside)):
            if any(name.startswith(_OF_RUN) and _is_model_file(name.removeprefix(_OF_RUN)) for name in names):
                return localize(uri.rstrip("/") + "/" + _OF_RUN.rstrip("/"), backends, cache_dir, key=key)
            raise ConfigError(f"{key}: {_no_model(uri, names)}" if key else _no_model(uri, names))
    return model_within(localize(uri, backends, cache_dir, key=key))


def model_within(path: Path) -> Path:
    """Return the model of a run directory, else ``path`` itself."""
    model = path / _OF_RUN
    is_run = model.is_dir() and not any(_is_model_file(file.name) for file in path.iterdir())
    return model if is_run and any(_is_model_file(file.name) for file in model.iterdir()) else path


def _is_model_file(name: str) -> bool:
    return name in _FILES or (name.endswith(".gguf") and "/" not in name)


def _no_model(uri: str, names: list[str]) -> str:
    inside = sorted({name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in _FILES})
    more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
    place = redact(uri).rstrip("/")
    hint = f"; it has models in it: {', '.join(f'{place}/{folder}' for folder in inside[:_SHOWN])}{more}" if inside else ""
    return f"{redact(uri)} is no model: the folder has no {' or '.join(_FILES)}, nor a .gguf file{hint}"

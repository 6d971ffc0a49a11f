"""Opening of runs, model folders, GGUF files, and URIs of them.

Users name them in Python and on the command line.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from attrs import frozen

from wmtp.config.inputs import plain_hub_name
from wmtp.config.places import build_backends
from wmtp.config.schema import StorageConfig
from wmtp.errors import ConfigError
from wmtp.json_files import read_json_object
from wmtp.models.adapter_folder import adapter_dtype, has_remote_base, tokenizer_place
from wmtp.models.adapters import quantize_base
from wmtp.models.build import build_model
from wmtp.models.vocabulary import check_vocabulary
from wmtp.plugins.built import built
from wmtp.runs.directory import CONFIG_FILE, is_run_dir, runs_in
from wmtp.storage.hub.names import cached_snapshot
from wmtp.storage.model_files import is_adapter
from wmtp.storage.model_folders import localize_model
from wmtp.storage.uris import file_path, localize, scheme_of
from wmtp.storage.walk import not_there, special_kind

if TYPE_CHECKING:
    from wmtp.config.schema import Config
    from wmtp.models.base import ModelLoader
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = [
    "OpenedModel",
    "find_model",
    "find_tokenizer",
    "load_model",
    "load_weights",
    "open_model",
    "saved_precision",
    "takes_named_tokenizer",
]


@frozen(kw_only=True, eq=False)
class OpenedModel:
    """A model that is ready to use.

    Args:
        name: what the user called it.
        path: the local file or folder.
        model: in eval mode, on its device.
        tokenizer: its own.
        run_dir: the run that it is from; None for a model that stands alone.
    """

    name: str
    path: Path
    model: MTPModel
    tokenizer: Tokenizer
    run_dir: Path | None


def find_model(name: str | os.PathLike[str], storage: StorageConfig | None = None) -> tuple[Path, Path | None]:
    """Find the model that ``name`` means, and its run directory.

    The model's local path comes first; no run: None.

    Args:
        name: as for `open_model`.
        storage: how to reach the store of a URI. Default: as without a config.

    Raises:
        ConfigError: there is nothing of that name, or the run has not saved a model yet.
        WMTPError: it could not be fetched.
    """
    name = os.fspath(name)
    if scheme_of(name) != "file":
        storage = storage or StorageConfig()
        return localize_model(name, build_backends(storage), Path(storage.cache_dir).expanduser()), None
    path = file_path(name)
    if (on_hub := plain_hub_name(name)) is not None:
        try:
            return find_model(on_hub.uri, storage)
        except ConfigError as error:
            raise ConfigError([f"{problem}; nor is there a folder {path}" for problem in error.problems]) from error
    if not path.exists():
        raise ConfigError(f"{name}: no such run, model folder or .gguf file")
    if special_kind(path):
        raise ConfigError(not_there(path))
    path = cached_snapshot(path)
    if not is_run_dir(path):
        _refuse_parts_of_runs(name, path)
        return path, None
    model = path / "model"
    if not model.is_dir():
        raise ConfigError(f"{name}: this run has saved no model yet; finish it with: wmtp run --resume {name}")
    return model, path


def _refuse_parts_of_runs(name: str, path: Path) -> None:
    """Refuse a folder of runs, and a run's checkpoint."""
    if path.parent.name == "checkpoints" and is_run_dir(path.parent.parent):
        run = path.parent.parent
        raise ConfigError(
            f"{name}: is a checkpoint of the run {run}; make a model of it by wmtp export {run} DIR --format wmtp --checkpoint "
            f"{path.name.removeprefix('step-')}, or name the run"
        )
    if not (path / "config.json").exists() and (inside := runs_in(path)):
        raise ConfigError(f"{name}: holds no model; it holds the runs {', '.join(inside[:10])}: name one of them")


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    storage: StorageConfig | None = None,
) -> MTPModel:
    """Open a model with all its heads, in eval mode.

    A plain Hugging Face model has head 1 alone.

    Args:
        name: a run directory, a model folder (as WMTP, Hugging Face or Meta write it), a ``.gguf`` file, or a URI of those.
        dtype: of the parameters. Default: as saved.
        device: where it shall be.
        storage: how to reach the store of a URI. Default: as without a config.

    Raises:
        ConfigError: there is no such model.
        WMTPError: files are missing, damaged or do not fit together.
    """
    path, run_dir = find_model(name, storage)
    model = _read(path, dtype, _storage_for(path, run_dir, storage)).to(device)
    model.source = path
    return model


def open_model(
    name: str | os.PathLike[str],
    *,
    device: torch.device,
    precision: Literal["fp32", "bf16"] | None = None,
    config: Config | None = None,
    storage: StorageConfig | None = None,
) -> OpenedModel:
    """Open a model and its tokenizer.

    Args:
        name: a run directory, a model folder (as WMTP, Hugging Face or Meta write it), a ``.gguf`` file, or a URI of those.
        device: where it shall be.
        precision: of the parameters. Default: as saved.
        config: the run's, or for a model that stands alone one whose ``[tokenizer]`` is used in place of that beside it.
        storage: how to reach the store of a URI. Default: as the config says.

    Raises:
        ConfigError: there is no such model, or the tokenizer is not the model's.
        WMTPError: files are missing or damaged.
    """
    storage = storage if storage is not None or config is None else config.storage
    path, run_dir = find_model(name, storage)
    dtype = None if precision is None else {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = load_weights(path, dtype, run_dir=run_dir, storage=storage).to(device)
    tokenizer = find_tokenizer(path, run_dir, config)
    check_vocabulary(model.vocab_size, tokenizer, key=os.fspath(name))
    return OpenedModel(name=os.fspath(name), path=path, model=model, tokenizer=tokenizer, run_dir=run_dir)


def load_weights(
    path: Path, dtype: torch.dtype | None = None, *, run_dir: Path | None = None, storage: StorageConfig | None = None
) -> MTPModel:
    """Read the model at a local path with all its heads.

    It is on the CPU, in eval mode, without gradients.

    Args:
        path: a model folder, or a ``.gguf`` file.
        dtype: of the parameters. Default: as saved.
        run_dir: of the run that it is from.
        storage: how to reach the store of an adapter's base. Default: as the run did, or as without a config.

    Raises:
        WMTPError: files are missing or damaged.
    """
    return _read(path, dtype, _storage_for(path, run_dir, storage)).requires_grad_(False)


def _storage_for(path: Path, run_dir: Path | None, storage: StorageConfig | None) -> StorageConfig:
    """Return the given storage options, or those of the run.

    The latter where none are given, and the run's adapter has its base in a store.
    """
    from wmtp.config.load import load

    given = storage or StorageConfig()
    if given == StorageConfig() and run_dir is not None and is_adapter(path) and has_remote_base(path):
        return load(run_dir / CONFIG_FILE).config.storage
    return given


def _read(path: Path, dtype: torch.dtype | None, storage: StorageConfig) -> MTPModel:
    model = build_model(_loader(path).with_storage(storage).load(path, dtype=dtype, seed=0), None, seed=0).eval()  # type: ignore[arg-type]
    quantize_base(model)
    return model


def saved_precision(path: Path) -> Literal["fp32", "bf16-params"]:
    """Return the ``devices.precision`` in which a model was saved.

    Only small files are read.
    """
    if is_adapter(path):
        return "bf16-params" if adapter_dtype(path) == torch.bfloat16 else "fp32"
    file = path / "config.json"
    facts = read_json_object(file) if file.is_file() else {}
    return "bf16-params" if facts.get("dtype", facts.get("torch_dtype")) == "bfloat16" else "fp32"


def _loader(path: Path) -> ModelLoader:
    from wmtp.models.loaders.hf import HfLoader
    from wmtp.models.loaders.meta import MetaMtpLoader

    is_meta = (path / "params.json").is_file() and not (path / "config.json").is_file()
    return MetaMtpLoader() if is_meta else HfLoader()


def find_tokenizer(path: Path, run_dir: Path | None, config: Config | None = None) -> Tokenizer:
    """Find the tokenizer of the model at ``path``.

    The one beside it, or the one that the config of its run names.

    Raises:
        WMTPError: there is none, or it is damaged.
    """
    from wmtp.config.load import load
    from wmtp.tokenizers.load import load_tokenizer

    named = run_dir is None and config is not None and config.tokenizer is not None
    if not named and _has_own_tokenizer(path):
        return load_tokenizer(path)
    if config is None and run_dir is not None:
        config = load(run_dir / CONFIG_FILE).config
    if config is not None and config.tokenizer is not None:
        uri = config.tokenizer.uri
        own = (
            path if uri is None else localize(uri, build_backends(config.storage), Path(config.storage.cache_dir).expanduser())
        )
        return built(config.tokenizer, "tokenizers", own)
    return load_tokenizer(tokenizer_place(path, storage=None if config is None else config.storage))


def takes_named_tokenizer(path: Path, run_dir: Path | None) -> bool:
    """Tell whether ``[tokenizer]`` has an effect.

    It has for a model that stands alone, or without a tokenizer of the core's beside it.
    """
    return run_dir is None or not _has_own_tokenizer(path)


def _has_own_tokenizer(path: Path) -> bool:
    from wmtp.tokenizers.saved import read_saved

    saved = read_saved(path) if path.is_dir() else None
    return saved is not None and saved["type"] in ("bytes", "hf-transformers", "hf-sentencepiece")

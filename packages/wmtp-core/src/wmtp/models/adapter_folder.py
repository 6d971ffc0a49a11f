"""Folders with an adapter (PEFT, LoRA) and without its base model."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from wmtp.config.adapter_rules import OWN_ADAPTER_CONFIG
from wmtp.config.inputs import plain_hub_name
from wmtp.config.places import build_backends
from wmtp.config.schema import LoraConfig, StorageConfig
from wmtp.errors import ConfigError, FileError, WMTPError
from wmtp.json_files import read_json_object
from wmtp.models.adapter_names import is_adapter_name, saved_name
from wmtp.models.adapter_targets import check_same, check_targets
from wmtp.models.adapters import Adapter, BaseModelName, inject
from wmtp.storage.hub.names import COMMIT, HubName, parse_hub_uri
from wmtp.storage.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from wmtp.storage.model_folders import localize_model
from wmtp.storage.uris import file_path, scheme_of
from wmtp.tokenizers.hf import HF_FILES
from wmtp.tokenizers.saved import SAVED_NAME
from wmtp.tokenizers.sentencepiece import MODEL_NAME

__all__ = [
    "SavedAdapter",
    "adapter_dtype",
    "check_fit",
    "check_settings",
    "find_base",
    "has_remote_base",
    "name_base",
    "need_peft",
    "read_adapter",
    "tokenizer_place",
    "write_adapter",
]

_log = logging.getLogger("wmtp")

_FORMAT: Final = 1


@frozen(kw_only=True, eq=False)
class SavedAdapter:
    """Content of an adapter's files.

    Args:
        folder: that they are in.
        config: peft's ``LoraConfig``.
        state: the tensors, named as in PEFT's files.
        base: the model that it belongs to.
        fingerprint: of that model; None where the files do not tell.
        quantize: how its weights were kept while the adapter learned.
        in_heads: the tensors of heads 2..H hold adapters of their own.
    """

    folder: Path
    config: Any
    state: Mapping[str, Tensor]
    base: BaseModelName
    fingerprint: str | None
    quantize: Literal["nf4"] | None = None
    in_heads: bool = False


def need_peft(what: str) -> None:
    """Raise if peft is not installed.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError(f"{what} needs peft: pip install 'wmtp-core[lora]'")


def name_base(uri: str, path: Path) -> BaseModelName:
    """Name a model so that PEFT finds it.

    It gets its name on the hub, or its local path.
    """
    if scheme_of(uri) == "hf":
        name = parse_hub_uri(uri)
        if not name.path:
            return BaseModelName(name=name.repo, revision=name.revision, uri=uri)
    return BaseModelName(name=str(path.resolve()), uri=uri if scheme_of(uri) != "file" else str(path.resolve()))


def find_base(folder: Path, base_uri: str | None, storage: StorageConfig) -> tuple[Path, BaseModelName]:
    """Find the base model of the adapter in ``folder``.

    It is where ``base_uri`` says, or under the name in the adapter's files. PEFT reads one of these: where that was changed, it
    goes before the place that WMTP noted.

    Args:
        folder: of the adapter.
        base_uri: the config's; None where it has none.
        storage: how to reach the store of a URI.

    Raises:
        ConfigError: they have none, or nothing is there.
        WMTPError: a file is damaged.
    """
    content = read_json_object(folder / ADAPTER_CONFIG)
    named, revision = content.get("base_model_name_or_path"), content.get("revision")
    own = read_json_object(folder / OWN_ADAPTER_CONFIG) if (folder / OWN_ADAPTER_CONFIG).is_file() else {}
    noted = own.get("base_uri")
    is_changed = False  # where the config has a place, nobody asks
    if base_uri is None and isinstance(named, str) and isinstance(noted, str):
        is_changed = not _may_be_named(noted, named)
    candidates = [base_uri] if base_uri is not None else [named, noted] if is_changed else [noted, named]
    reasons = []
    for uri in candidates:
        if not isinstance(uri, str) or not uri:
            continue
        try:
            found, path = _locate(uri, folder, revision if uri == named else None, storage)
        except WMTPError as error:
            reasons.append(str(error))
            continue
        if is_changed and uri == noted:
            _log.warning("%s: the base that %s names is not there (%s); %s is used", folder, ADAPTER_CONFIG, named, noted)
        return path, name_base(found, path)
    remedy = "name the model that it belongs to: models.base.base_uri"
    if base_uri is None:
        remedy += f", or base_model_name_or_path in its {ADAPTER_CONFIG}"
    why = "; ".join(dict.fromkeys(reasons)) or f"{ADAPTER_CONFIG} names no base_model_name_or_path"
    raise ConfigError(f"{folder} is an adapter, and its base is not found: {why}; {remedy}")


def _may_be_named(uri: str, name: str) -> bool:
    """Tell whether PEFT's file may name a model so; see `name_base`."""
    if scheme_of(uri) == "file":
        return name == uri
    if scheme_of(uri) == "hf" and not (hub := parse_hub_uri(uri)).path:
        return name == hub.repo
    return Path(name).is_absolute()  # where it was fetched to, on any machine


def tokenizer_place(path: Path, base_uri: str | None = None, storage: StorageConfig | None = None) -> Path:
    """Find where a model's tokenizer is.

    It is beside the model. PEFT writes none beside an adapter: there it is beside the base.

    Args:
        path: of the model.
        base_uri: as for `find_base`.
        storage: as for `find_base`. Default: as without a config.

    Raises:
        ConfigError, WMTPError: as for `find_base`.
    """
    if not is_adapter(path) or any((path / name).is_file() for name in (SAVED_NAME, MODEL_NAME, *HF_FILES)):
        return path
    base, _ = find_base(path, base_uri, storage or StorageConfig())
    _log.info("%s holds no tokenizer: that of its base is used, %s", path, base)
    return base


def _locate(uri: str, folder: Path, revision: Any, storage: StorageConfig) -> tuple[str, Path]:
    """Localize a URI, a path or a name on the hub.

    A path counts from the current directory or from ``folder``. Returns the URI as well.
    """
    if scheme_of(uri) == "file":
        places = [file_path(uri), folder / uri]
        here = next((place for place in places if place.exists()), None)
        if here is None and (name := plain_hub_name(uri)) is not None:
            commit = revision if isinstance(revision, str) and COMMIT.fullmatch(revision) else name.revision
            uri = HubName(repo=name.repo, revision=commit).uri
        elif here is None:
            raise ConfigError(f"{uri}: no such file or folder")
        else:
            uri = str(here.resolve())
    return uri, localize_model(uri, build_backends(storage), Path(storage.cache_dir).expanduser())


def has_remote_base(folder: Path) -> bool:
    """Tell whether the adapter's base model is named by a remote URI.

    Raises:
        WMTPError: a file is damaged.
    """
    file = folder / OWN_ADAPTER_CONFIG
    uri = read_json_object(file).get("base_uri") if file.is_file() else None
    return isinstance(uri, str) and scheme_of(uri) != "file"


def read_adapter(folder: Path, base: BaseModelName) -> SavedAdapter:
    """Read the files of an adapter; `wmtp.storage.model_files.check_folder` has looked at them.

    Raises:
        ConfigError: peft is not installed.
        WMTPError: a file is damaged.
    """
    need_peft(f"{folder}: an adapter")
    own = read_json_object(folder / OWN_ADAPTER_CONFIG) if (folder / OWN_ADAPTER_CONFIG).is_file() else {}
    quantize = own.get("quantize")
    if own and (own.get("format") != _FORMAT or quantize not in (None, "nf4")):
        raise FileError(f"{folder / OWN_ADAPTER_CONFIG}: format {own.get('format')!r} is not known to this version of WMTP")
    config = _read_config(folder)
    with _reading(folder) as file:
        state = load_file(file)
    for name, tensor in state.items():
        if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            what = "numbers that are not finite" if tensor.is_floating_point() else f"whole numbers ({tensor.dtype})"
            raise FileError(f"{file}: {name} holds {what}; fetch the adapter again")
    config.inference_mode = False
    known, in_heads = own.get("base_fingerprint"), own.get("heads") == "adapters"
    return SavedAdapter(
        folder=folder, config=config, state=state, base=base, fingerprint=known, quantize=quantize, in_heads=in_heads
    )


def _read_config(folder: Path) -> Any:
    from peft import LoraConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig.from_pretrained(str(folder))
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise FileError(f"{folder}: the adapter cannot be read: {error}") from error


@contextmanager
def _reading(folder: Path) -> Iterator[Path]:
    """Name an adapter's file of tensors, also where it is damaged."""
    file = folder / ADAPTER_WEIGHTS
    try:
        yield file
    except (OSError, SafetensorError) as error:
        raise FileError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error


def check_fit(folder: Path, base: PreTrainedModel) -> None:
    """Refuse an adapter that does not fit its base.

    Names and shapes are compared, and no numbers are read.

    Args:
        folder: of the adapter.
        base: its base on the meta device; the adapter's modules are put into it.

    Raises:
        ConfigError: peft is not installed.
        WMTPError: it does not, or a file is damaged.
    """
    need_peft(f"{folder}: an adapter")
    config = _read_config(folder)
    with _reading(folder) as file, safe_open(file, framework="pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    check_targets(config, base, folder)
    config.init_lora_weights = False  # some begin with numbers of the base
    try:
        inject(base, config, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    except FileError as error:
        raise FileError(f"{folder}: {error}") from error


def check_settings(folder: Path, lora: LoraConfig, quantize: str | None, base: PreTrainedModel) -> None:
    """Refuse to train an adapter further under other settings, as `check_same` does.

    Args:
        folder: of the adapter.
        lora: the config's ``[models.base.lora]``.
        quantize: the config's ``models.base.quantize``.
        base: its base on the meta device.

    Raises:
        ConfigError: they differ, or peft is not installed.
        WMTPError: a file is damaged.
    """
    need_peft(f"{folder}: an adapter")
    check_same(_read_config(folder), lora, quantize, base, folder)


def adapter_dtype(folder: Path) -> torch.dtype:
    """Return an adapter's precision: bf16 if all tensors are, else fp32.

    Raises:
        WMTPError: the file is damaged.
    """
    with _reading(folder) as file, safe_open(file, framework="pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32


def write_adapter(base: torch.nn.Module, adapter: Adapter, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Write an adapter as PEFT does.

    Args:
        base: the model that it is on.
        adapter: its facts.
        folder: that is there.
        state: the whole tensors of ``base`` that learn, where this process holds only a part of them.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    named = dict(base.named_parameters()) if state is None else state
    tensors = {saved_name(n): t.detach().cpu().contiguous() for n, t in named.items() if is_adapter_name(n)}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    adapter.config.inference_mode = True
    adapter.config.save_pretrained(str(folder))
    adapter.config.inference_mode = False
    own = {
        "format": _FORMAT,
        "base_uri": None if adapter.base is None else adapter.base.uri,
        "base_fingerprint": adapter.fingerprint,
        "quantize": adapter.quantize,
        "heads": "adapters" if adapter.in_heads else "full",
    }
    (folder / OWN_ADAPTER_CONFIG).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")

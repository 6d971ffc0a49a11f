"""Hugging Face folders, GGUF files, and what WMTP saves itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from wmtp.config.schema import StorageConfig
from wmtp.errors import ConfigError, FileError, WMTPError
from wmtp.models.adapter_folder import adapter_dtype, check_fit, find_base, need_peft, read_adapter
from wmtp.models.adapters import BaseModelName, fingerprint
from wmtp.models.base import LoadedModel, ModelInfo, ModelLoader
from wmtp.models.heads_folder import saved_draft_ids, saved_heads, saved_tensors
from wmtp.models.loaders import linear_heads
from wmtp.models.loaders.describe import describe, empty_model, require_causal
from wmtp.models.loaders.files import can_be_mapped, opened_by_transformers, read_config, weight_files
from wmtp.models.loaders.names import Opening, find_untouched
from wmtp.models.untouched import Untouched
from wmtp.storage.gguf_header import lost_layers
from wmtp.storage.model_files import check_folder, find_gguf, is_adapter
from wmtp.storage.walk import not_there, special_kind

__all__ = ["HfLoader", "from_tensors", "strict_from_pretrained"]

#: the types of weights that can be used as they lie in files, as safetensors calls them
_STORED = {frozenset({"BF16"}): torch.bfloat16, frozenset({"F16"}): torch.float16, frozenset({"F32"}): torch.float32}


class HfLoader(ModelLoader):
    """Loader of Hugging Face folders and GGUF files.

    Weights in ``.bin`` files are read without running pickled code. A folder that `wmtp.models.mtp.MTPModel.save_pretrained`
    wrote brings its extra heads, and so does one in the linear-head layout (`wmtp.models.loaders.linear_heads`).

    Args:
        gguf_file: which ``.gguf`` file of the folder; None finds it.
        attn_implementation: the attention kernel; None leaves it to transformers.
        base_uri: of the model that an adapter belongs to; None: the one that the adapter names.
        storage: how to reach the store of its URI. Default: as without a config.
    """

    def __init__(
        self,
        *,
        gguf_file: str | None = None,
        attn_implementation: str | None = None,
        base_uri: str | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        self._gguf_file = gguf_file
        self._attn_implementation = attn_implementation
        self._base_uri = base_uri
        self._storage = storage or StorageConfig()

    def with_storage(self, storage: StorageConfig) -> HfLoader:
        """See `ModelLoader.with_storage`: the base of an adapter is found by these options."""
        return HfLoader(
            gguf_file=self._gguf_file,
            attn_implementation=self._attn_implementation,
            base_uri=self._base_uri,
            storage=storage,
        )

    def info(self, path: Path | None) -> ModelInfo:
        """See `ModelLoader.info`."""
        folder, gguf_file = self._locate(path)
        if gguf_file is not None:
            config = _gguf_config(folder, gguf_file)
            return evolve(describe(empty_model(config)), unsavable=lost_layers(folder / gguf_file))
        if linear_heads.is_layout(folder):
            config, heads = linear_heads.read_config(folder)
            return describe(empty_model(config), heads)
        if is_adapter(folder):
            need_peft(f"{folder}: an adapter")
            base, plain = self._find_base(folder)[0], self._plain()
            info = plain.info(base)
            check_fit(folder, plain.empty(base))
            return evolve(info, heads=saved_heads(folder) or info.heads)
        config = read_config(folder)
        require_causal(config)
        model = empty_model(config)
        opening = find_untouched(folder, config)
        if opening.unknown:
            raise _misfit(folder, model, [f"{name} is unexpected" for name in opening.unknown])
        about = describe(model, saved_heads(folder))
        return evolve(about, native=opening.native, unsavable=opening.untouched.problem)

    def load(self, path: Path | None, *, dtype: torch.dtype | None, seed: int) -> LoadedModel:
        """See `ModelLoader.load`. A ``dtype`` of None is that of the files."""
        folder, gguf_file = self._locate(path)
        options = self._options(dtype)
        if gguf_file is not None:
            model = _load_gguf(folder, gguf_file, options)
            file = folder / gguf_file
            return LoadedModel(model=model, untouched=Untouched(source=file, problem=lost_layers(file)))
        if linear_heads.is_layout(folder):
            config, heads = linear_heads.read_config(folder)
            base, extra = linear_heads.read_tensors(folder)
            return LoadedModel(model=from_tensors(folder, config, base, options), heads=heads, head_state=extra)
        if is_adapter(folder):
            return self._load_adapter(folder, dtype=dtype, seed=seed)
        config = read_config(folder)
        require_causal(config)
        return self._load_folder(folder, config, find_untouched(folder, config), options)

    def open_stored(self, path: Path | None, *, seed: int) -> LoadedModel | None:
        """See `ModelLoader.open_stored`.

        For folders in bf16, fp16 or fp32, whose architecture has fp32 buffers in each. Of an adapter, its base is opened so.
        """
        folder, gguf_file = self._locate(path)
        if gguf_file is not None or linear_heads.is_layout(folder):
            return None
        if is_adapter(folder):
            base_path, name = self._find_base(folder)
            base = self._plain().open_stored(base_path, seed=seed)
            return None if base is None else self._with_adapter(folder, base, base_path, name, torch.float32)
        config = read_config(folder)
        require_causal(config)
        opening = find_untouched(folder, config)
        if opening.types not in _STORED:
            return None
        loaded = self._load_folder(folder, config, opening, self._options(_STORED[opening.types]))
        # what an architecture computes when it is made may be rounded to the type of its parameters
        if any(buffer.is_floating_point() and buffer.dtype != torch.float32 for buffer in loaded.model.buffers()):
            return None
        loaded.model.config.dtype = torch.float32  # of the trained copies
        parameters = dict(loaded.model.named_parameters())
        mapped = all(can_be_mapped(file) for file in weight_files(folder))
        stored = {name: own for name, own in opening.plain.items() if name in parameters} if mapped else {}
        return evolve(loaded, stored=stored)

    def _options(self, dtype: torch.dtype | None) -> dict[str, Any]:
        options: dict[str, Any] = {"dtype": dtype or "auto"}
        if self._attn_implementation is not None:
            options["attn_implementation"] = self._attn_implementation
        return options

    @staticmethod
    def _load_folder(folder: Path, config: PreTrainedConfig, opening: Opening, options: Mapping[str, Any]) -> LoadedModel:
        model = strict_from_pretrained(AutoModelForCausalLM, folder, folder, {**options, "config": config}, opening)
        heads = saved_heads(folder)
        state = None if heads is None or heads.kind == "native" else saved_tensors(folder)
        return LoadedModel(
            model=model,
            heads=heads,
            head_state=state,
            draft_ids=saved_draft_ids(folder, model),
            untouched=opening.untouched,
            native=opening.native,
        )

    def empty(self, path: Path | None) -> PreTrainedModel:
        """Build the model without memory for weights; of an adapter, its base.

        Raises:
            WMTPError, ConfigError: as for `info`.
        """
        folder, gguf_file = self._locate(path)
        if gguf_file is not None:
            return empty_model(_gguf_config(folder, gguf_file))
        if linear_heads.is_layout(folder):
            return empty_model(linear_heads.read_config(folder)[0])
        if is_adapter(folder):
            return self._plain().empty(self._find_base(folder)[0])
        return empty_model(read_config(folder))

    def _load_adapter(self, folder: Path, *, dtype: torch.dtype | None, seed: int) -> LoadedModel:
        path, name = self._find_base(folder)
        # what a run in bf16 has saved was learned on a base in bf16
        whole = torch.bfloat16 if dtype is None and adapter_dtype(folder) == torch.bfloat16 else dtype
        return self._with_adapter(folder, self._plain().load(path, dtype=whole, seed=seed), path, name, dtype)

    @staticmethod
    def _with_adapter(
        folder: Path, base: LoadedModel, path: Path, name: BaseModelName, dtype: torch.dtype | None
    ) -> LoadedModel:
        """Add an adapter, and the heads beside it, to its base.

        ``path`` is where the base was found.
        """
        saved = read_adapter(folder, name)
        if saved.fingerprint is not None and saved.fingerprint != fingerprint(base.model):
            raise FileError(
                f"{folder}: its adapter was trained on another model than {path}, which has the same shape and other numbers; "
                "name the right one: models.base.base_uri"
            )
        state = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in saved.state.items()}
        heads = saved_heads(folder)
        own: dict[str, Any] = {}
        if heads is not None:
            tensors = saved_tensors(folder)
            own = {"heads": heads, "head_state": {n: t if dtype is None else t.to(dtype) for n, t in tensors.items()}}
            own["draft_ids"] = saved_draft_ids(folder, base.model)
        return evolve(base, adapter=evolve(saved, state=state), **own)

    def _find_base(self, folder: Path) -> tuple[Path, BaseModelName]:
        path, name = find_base(folder, self._base_uri, self._storage)
        if is_adapter(path):
            raise FileError(f"{folder}: its base, {path}, is an adapter too; merge that first: wmtp export --format wmtp")
        return path, name

    def _plain(self) -> HfLoader:
        """Make the loader of an adapter's base."""
        return HfLoader(attn_implementation=self._attn_implementation)

    def _locate(self, path: Path | None) -> tuple[Path, str | None]:
        """Return the folder and, if any, the GGUF file to read."""
        if path is None or not path.exists() or special_kind(path):
            raise FileError(f"{path}: no such file or folder" if path is None else not_there(path))
        if self._base_uri is not None and not is_adapter(path):
            raise ConfigError("models.base.base_uri: has no effect: uri names no adapter; remove it")
        if path.is_file():
            if path.suffix != ".gguf":
                raise FileError(f"{path}: not a model folder and not a .gguf file")
            if self._gguf_file is not None:
                raise ConfigError(f"models.base.gguf_file: has no effect: uri names the file {path.name}; remove it")
            return path.parent, path.name
        if self._gguf_file is not None:
            if not (path / self._gguf_file).is_file():
                raise FileError(f"{path / self._gguf_file}: no such file")
            return path, self._gguf_file
        check_folder(path)
        try:
            return path, find_gguf(path)
        except WMTPError as error:
            raise ConfigError(f"models.base.gguf_file: {error}") from error


def from_tensors(
    source: Path, config: PreTrainedConfig, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> PreTrainedModel:
    """Build the model of ``config`` with exactly these weights.

    Every tensor must be there and fit.

    Args:
        source: its name in messages.
        config: of a causal language model.
        tensors: named as in the model's own state dict.
        options: for ``from_pretrained``.
    """
    model_class = type(empty_model(config))
    return strict_from_pretrained(model_class, None, source, {"config": config, "state_dict": dict(tensors), **options})


def strict_from_pretrained(
    model_class: Any, place: Path | None, source: Path, options: Mapping[str, Any], opening: Opening | None = None
) -> PreTrainedModel:
    """``model_class.from_pretrained``, in which every tensor must be there and fit.

    Args:
        model_class: of transformers.
        place: the folder; None where ``options`` bring the tensors.
        source: what messages call it.
        options: for ``from_pretrained``.
        opening: of a folder: the tensors that the model does not take, and which of them are no mistake.

    Raises:
        WMTPError: a tensor is missing, unexpected or of another shape.
    """
    # without these two flags transformers only warns, and trains random numbers in place of the missing tensors
    strict = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    safe = {"local_files_only": True, "weights_only": True, "trust_remote_code": False} if place is not None else {}
    model, found = opened_by_transformers(source, lambda: model_class.from_pretrained(place, **options, **strict, **safe))
    problems = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    unexpected = set(found["unexpected_keys"])
    if opening is not None:
        unexpected = (unexpected - opening.kept) | set(opening.unknown)
    problems += [f"{name} is unexpected" for name in sorted(unexpected)]
    problems += [
        f"{name} has shape {list(shape)} in place of {list(wanted)}" for name, shape, wanted in sorted(found["mismatched_keys"])
    ]
    problems += [str(message) for message in found.get("error_msgs") or ()]
    if problems:
        raise _misfit(source, model, problems)
    return model.eval()


def _misfit(source: Path, model: PreTrainedModel, problems: list[str]) -> FileError:
    return FileError(f"{source}: the tensors do not fit {type(model).__name__}: {'; '.join(problems)}")


def _need_gguf() -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"reading a GGUF file needs {' and '.join(missing)}: pip install 'wmtp-core[gguf]'")


def _gguf_config(folder: Path, gguf_file: str) -> PreTrainedConfig:
    _need_gguf()
    return opened_by_transformers(
        folder / gguf_file, lambda: AutoConfig.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
    )


def _load_gguf(folder: Path, gguf_file: str, options: Mapping[str, Any]) -> PreTrainedModel:
    _need_gguf()
    model = strict_from_pretrained(AutoModelForCausalLM, folder, folder / gguf_file, {**options, "gguf_file": gguf_file})
    # the tensors are plain numbers by now: without the marks of the file that they came from, the model can be saved
    for holder, marks in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config", "_is_quantized")),
    ):
        for mark in marks:
            if mark in vars(holder):
                delattr(holder, mark)
    return model

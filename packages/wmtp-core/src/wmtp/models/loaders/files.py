"""Model folders on disk: their content and its completeness."""

from __future__ import annotations

import pickle
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from wmtp.errors import FileError, WMTPError, described
from wmtp.json_files import read_json_object
from wmtp.log_lines import transformers_quiet
from wmtp.storage.architectures import STAND_INS
from wmtp.storage.model_files import check_generation, check_types, shard_files

__all__ = [
    "can_be_mapped",
    "config_from",
    "has_stand_in",
    "opened_by_transformers",
    "read_bin",
    "read_config",
    "read_json",
    "tensor_shapes",
    "weight_files",
]

T = TypeVar("T")


_MIMO = "MiMoForCausalLM"


def has_stand_in(config: PreTrainedConfig) -> bool:
    """Tell whether a config is that of a stand-in.

    Its folder's own has to be written back.
    """
    return _MIMO in (getattr(config, "architectures", None) or ())


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a model folder.

    Raises:
        WMTPError: the file is missing or holds something else.
    """
    if not file.exists():
        raise FileError(f"{file}: no such file; a model folder needs it")
    return read_json_object(file)


def read_config(folder: Path) -> PreTrainedConfig:
    """Read the config of a Hugging Face folder.

    Raises:
        WMTPError: it is missing, damaged, or of an architecture that transformers does not have itself.
    """
    file = folder / "config.json"
    content = read_json(file)
    check_types(file, content)
    check_generation(folder)
    model_type = content.get("model_type")
    if model_type is None:
        raise FileError(f"{file}: has no model_type: not the config of a transformers model")
    if model_type not in CONFIG_MAPPING and model_type in STAND_INS:
        return config_from(file, content)
    if model_type not in CONFIG_MAPPING:
        reason = (
            "its own code would have to run, which WMTP never does"
            if "auto_map" in content
            else "a newer transformers may know it"
        )
        raise FileError(f"{file}: the installed transformers has no architecture '{model_type}'; {reason}")
    return opened_by_transformers(file, lambda: AutoConfig.from_pretrained(folder, local_files_only=True))


def config_from(file: Path, content: dict[str, Any]) -> PreTrainedConfig:
    """Make a config from the content of a JSON file.

    Its ``model_type`` is known, or has a stand-in.
    """
    known = content["model_type"]
    if known not in CONFIG_MAPPING and known in STAND_INS:
        known = STAND_INS[known]
        content = {name: value for name, value in content.items() if name != "auto_map"} | {"model_type": known}
    return opened_by_transformers(file, lambda: CONFIG_MAPPING[known].from_dict(content))


def weight_files(folder: Path) -> list[Path]:
    """List the files with a folder's tensors: safetensors, or else PyTorch's ``.bin``.

    Where there is an index, its files are listed.

    Raises:
        WMTPError: there are none, one that the index names is not there, or one is damaged.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():  # an index beside it is of an older save, and transformers does not read it either
            if single.endswith(".safetensors"):
                tensor_shapes(folder / single)
            return [folder / single]
        if (folder / index).is_file():
            return _indexed_files(folder / index)
    raise FileError(f"{folder}: holds no weights (model.safetensors, its shards, pytorch_model.bin, or a .gguf file)")


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header.

    Raises:
        WMTPError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error


def can_be_mapped(file: Path) -> bool:
    """Tell whether a file's tensors can be read one by one.

    Those of PyTorch before 1.6 cannot, which are no zip.
    """
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def read_bin(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file of ``torch.save``, by name.

    They are not read yet.

    Raises:
        WMTPError: it is damaged, or holds anything else.
    """
    mapped = can_be_mapped(file)
    state = opened_by_transformers(file, lambda: torch.load(file, map_location="cpu", weights_only=True, mmap=mapped))
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileError(f"{file}: holds no plain mapping from names to tensors")
    return state


def _indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names, after checking them.

    All are beside it and whole.

    Raises:
        WMTPError: one is missing, damaged, elsewhere, or lacks a tensor.
    """
    weight_map = shard_files(index)
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if any(file.suffix != ".safetensors" for file in files):
        return files
    present = {name for file in files for name in tensor_shapes(file)}
    for name, shard in weight_map.items():
        if name not in present:
            raise FileError(f"{index.parent / shard}: lacks the tensor {name}, which {index.name} places there")
    return files


def opened_by_transformers(path: Path, action: Callable[[], T]) -> T:
    """Do ``action``; whatever transformers raises becomes one clear error about ``path``."""
    try:
        with transformers_quiet():
            return action()
    except (WMTPError, MemoryError):
        raise
    except pickle.UnpicklingError as error:  # torch's own text advises to run it
        raise FileError(
            f"{path}: its .bin files hold more than tensors, and what a file holds is never run; get it as safetensors, or "
            "convert it where its source is trusted"
        ) from error
    except Exception as error:
        # its exceptions have no common base: OSError, ValueError, KeyError, UnpicklingError, dataclass validation …
        raise FileError(f"{path}: transformers cannot open it: {described(error)}") from error
    except BaseException as error:  # Ctrl-C
        # Where it falls into the start of a thread of transformers' loading pool, Python would wait for that thread at its end.
        # A pool without a reference ends its threads, and these frames hold the last one.
        traceback.clear_frames(error.__traceback__)
        raise

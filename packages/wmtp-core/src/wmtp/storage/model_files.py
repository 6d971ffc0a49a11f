"""Facts about a Hugging Face folder from its small JSON files.

Imports no torch, and reads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from wmtp.errors import FileError
from wmtp.json_files import read_json_object
from wmtp.storage.architectures import is_unknown

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "HEADS_CONFIG",
    "LAYERS_LIMIT",
    "check_folder",
    "check_generation",
    "check_types",
    "find_gguf",
    "is_adapter",
    "quantization",
    "quantized_problem",
    "shard_files",
]

#: ten times the deepest model known; building more would take all of the memory
LAYERS_LIMIT: Final = 10_000
#: types of what is read in ``config.json`` before transformers reads it; a key may be absent or null
_TYPES: Final = {"architectures": list, **dict.fromkeys(("dtype", "model_type", "torch_dtype"), str)}
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
#: of heads 2..H that WMTP saved
HEADS_CONFIG: Final = "mtp_heads.json"
GENERATION_CONFIG: Final = "generation_config.json"
_INDEXES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin", *_INDEXES)
#: fields of PEFT's config that change what an adapter computes or holds, with the values by which they do not
_PLAIN_LORA: Final = {
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
} | dict.fromkeys(("arrow_config", "kasa_config", "megatron_config", "monteclora_config", "velora_config"), (None, {}))
#: configs of quantization that older programs wrote beside config.json, and the method
_OLD_QUANTIZATION: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_FP8: Final = ("float8_e4m3fn", "float8_e5m2")


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds a PEFT adapter without its model."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).exists() for name in _WEIGHTS)


def check_folder(folder: Path) -> None:
    """Refuse a folder that WMTP cannot open as a model.

    Only its small files are read.

    Raises:
        WMTPError: it holds an adapter that is none of LoRA or lacks its weights, needs its own code, names shards elsewhere, or
            has a damaged config.
    """
    adapter, file = folder / ADAPTER_CONFIG, folder / "config.json"
    if is_adapter(folder):
        _check_adapter(folder)
        return
    if adapter.exists():
        raise FileError(
            f"{folder}: holds a model and an adapter ({ADAPTER_CONFIG}), and transformers may put the one on the other; move "
            "the adapter's files elsewhere"
        )
    if not file.exists():
        weights = next((name for name in (ADAPTER_WEIGHTS, _PICKLED) if (folder / name).exists()), None)
        if weights is not None and not adapter.exists():
            raise FileError(
                f"{folder}: holds an adapter's weights ({weights}) and no {ADAPTER_CONFIG}, which names the base model and the "
                "rank; fetch it too"
            )
        return
    content = read_json_object(file)
    check_types(file, content)
    for table in _tables(content):
        layers = table.get("num_hidden_layers")
        if isinstance(layers, int) and not 0 < layers <= LAYERS_LIMIT:
            raise FileError(f"{file}: num_hidden_layers = {layers}, and a model has 1 to {LAYERS_LIMIT:,}; is it damaged?")
    if is_unknown(content):
        code = content.get("auto_map")
        own_code = isinstance(code, dict) and "AutoConfig" in code
        why = (
            "its own code would have to run, which WMTP never does"
            if own_code
            else "correct model_type, or install a newer one"
        )
        raise FileError(f"{file}: the installed transformers has no architecture '{content['model_type']}'; {why}")
    if not any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        for name in _INDEXES:
            if (folder / name).exists():
                shard_files(folder / name)
                return


def _are_of_experts(value: Any) -> bool:
    """Recognize PEFT's names of linear maps inside experts.

    transformers joins the weights of these into two tensors.
    """
    return isinstance(value, list) and all(str(name).rpartition(".")[2] in ("gate_up_proj", "down_proj") for name in value)


def _check_adapter(folder: Path) -> None:
    content = read_json_object(folder / ADAPTER_CONFIG)
    remedy = "merge it into its base with PEFT's merge_and_unload(), and name the folder that you save then"
    if (kind := content.get("peft_type")) != "LORA":
        raise FileError(f"{folder}: holds an adapter of type {kind}, and WMTP opens LORA; {remedy}")
    for key, plain in _PLAIN_LORA.items():
        if key == "target_parameters" and _are_of_experts(content.get(key)):
            continue
        if (value := content.get(key)) not in plain:
            raise FileError(
                f"{folder}: its adapter is more than LoRA's two matrices a linear map ({key} = {value!r}); {remedy}"
            )
    file = folder / ADAPTER_CONFIG
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not (_is_rank(rank) and _is_number(alpha)):
        raise FileError(f"{file}: r = {rank!r} and lora_alpha = {alpha!r} are those of no adapter; fetch it again")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (
            f"; {_PICKLED} is a pickle, which WMTP never opens: PEFT's save_pretrained() writes safetensors"
            if (folder / _PICKLED).exists()
            else "; fetch it again"
        )
        raise FileError(f"{folder}: holds an {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}{pickled}")
    for key, (fits, wanted) in _ADAPTER_SETTINGS.items():
        if not fits(value := content.get(key, _ABSENT.get(key))):
            raise FileError(f"{file}: {key} = {value!r}, and PEFT has {wanted} there; fetch it again")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    """Accept a text, or a list of some."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_table_of(fits: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def _are_layers(value: Any) -> bool:
    return value is None or all(type(layer) is int for layer in (value if isinstance(value, list) else [value]))


_PICKLED: Final = "adapter_model.bin"
#: how settings look that PEFT reads without looking at them
_ADAPTER_SETTINGS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "target_modules": (_is_text, "the names of modules or a pattern"),
    "exclude_modules": (lambda value: value is None or _is_text(value), "the names of modules or a pattern"),
    "layers_to_transform": (_are_layers, "numbers of layers"),
    "layers_pattern": (lambda value: value is None or _is_text(value), "the names of lists of layers"),
    "rank_pattern": (partial(_is_table_of, _is_rank), "a table of ranks"),
    "alpha_pattern": (partial(_is_table_of, _is_number), "a table of numbers"),
}
#: in place of settings that a config leaves out
_ABSENT: Final[Mapping[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}


def shard_files(index: Path) -> Mapping[str, str]:
    """Read which file each tensor of an index is in.

    Raises:
        WMTPError: the index is damaged, or names a file that is missing or not in its folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: has no weight_map")
    for tensor, name in weight_map.items():
        # a name with a folder in it could lead anywhere on this machine
        if not isinstance(name, str) or not name.strip(".") or {"/", "\\", "\0"} & set(name):
            raise FileError(f"{index}: weight_map places {tensor} in {name!r}, which is not the name of a file in its folder")
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise FileError(f"{index.parent / name}: not there, but {index.name} names it; fetch the model again")
    return weight_map


def find_gguf(folder: Path) -> str | None:
    """Name the ``.gguf`` file to read from a folder.

    None where it is to be read as safetensors or ``.bin``.

    Raises:
        WMTPError: there are several, or other weights beside one, and nothing says which is meant.
    """
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if not files or (any((folder / name).exists() for name in _WEIGHTS) and (folder / "config.json").exists()):
        return None
    if len(files) > 1:
        raise FileError(f"{folder} holds several: {', '.join(files)}; name one of them")
    if others := sorted(file.name for file in folder.glob("*.safetensors")):
        raise FileError(
            f"{folder} holds {files[0]} and {others[0]}, without a config.json for the latter; name the .gguf file, or add "
            "config.json"
        )
    return files[0]


def quantization(folder: Path) -> str | None:
    """Return the method by which a folder's weights are quantized.

    None where they are not, or are read as plain numbers.

    Raises:
        WMTPError: a config is damaged.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    content = read_json_object(file)
    for table in _tables(content):
        if isinstance(found := table.get("quantization_config"), dict):
            bits = {"load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes"}
            method = found.get("quant_method") or next((bits[key] for key in bits if found.get(key)), "unknown method")
            if method != "mxfp4":  # transformers opens it as bf16
                return str(method)
        if (dtype := table.get("dtype", table.get("torch_dtype"))) in _FP8:
            return str(dtype)
    return next((method for name, method in _OLD_QUANTIZATION.items() if (folder / name).is_file()), None)


def quantized_problem(folder: Path, method: str) -> str:
    """Say that a quantized model cannot be trained."""
    return (
        f"{folder} is quantized ({method}), and quantized weights cannot be trained; use the model in bf16 or fp32 that it was "
        "made from"
    )


def _tables(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield content
    yield from (value for key, value in content.items() if key.endswith("text_config") and isinstance(value, dict))


def check_types(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse a ``config.json`` whose names are none.

    Raises:
        FileError: one has another type.
    """
    for key, kind in _TYPES.items():
        if not isinstance(content.get(key), kind | None):
            raise FileError(f"{file}: is damaged: {key} is {content[key]!r:.40}")


def check_generation(folder: Path) -> None:
    """Refuse a ``generation_config.json`` whose tokens are none.

    Raises:
        FileError: it is damaged.
    """
    file = folder / GENERATION_CONFIG
    content = read_json_object(file) if file.is_file() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(key)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in tokens):
            raise FileError(f"{file}: is damaged: {key} is {value!r:.40}, and no number of a token")

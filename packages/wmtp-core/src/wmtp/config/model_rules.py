"""Checks of local model folders, by their small files."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from wmtp.config.adapter_rules import other_settings
from wmtp.config.problems import Problem
from wmtp.config.schema import Config, LoraConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.json_files import read_json_object
from wmtp.plugins.contract import ModelLoaderConfig
from wmtp.storage.architectures import linear_maps
from wmtp.storage.gguf_header import lost_layers
from wmtp.storage.hub.names import cached_snapshot
from wmtp.storage.model_files import check_folder, find_gguf, is_adapter, quantization, quantized_problem
from wmtp.storage.model_folders import LOADERS, model_within
from wmtp.storage.uris import file_path, scheme_of
from wmtp.storage.walk import special_kind

__all__ = ["model_problems"]

#: method of quantization → packages of which transformers needs one
_NEEDS: Final = {"gptq": ("gptqmodel", "auto_gptq"), "awq": ("gptqmodel", "awq"), "bitsandbytes": ("bitsandbytes",)}


def model_problems(config: Config) -> Iterator[Problem]:
    """Report problems of local model folders, and of draft vocabularies."""
    yield from _draft_vocabulary_problems(config)
    yield from _length_problems(config)
    yield from _template_problems(config)
    yield from _gguf_problems(config)
    yield from _target_problems(config)
    for name, model in config.models.items():
        loader, key = model.loader, ("models", name)
        if loader.type not in LOADERS:
            continue
        try:
            path = _local(loader.uri)
        except ConfigError:  # said of the uri
            continue
        if path is not None and loader.type == "meta-mtp" and path.is_file():
            yield Problem((*key, "uri"), f"{path} is a file; name the folder that holds params.json")
        if path is None or loader.type != "hf" or getattr(loader, "gguf_file", None) is not None:
            continue
        if problem := _no_model(path):
            yield Problem((*key, "uri"), problem)
        if not path.is_dir():
            continue
        try:
            check_folder(path)
            method = quantization(path)
        except WMTPError as error:
            yield Problem((*key, "uri"), str(error))
            continue
        try:
            find_gguf(path)
        except WMTPError as error:
            yield Problem((*key, "gguf_file"), str(error), at=(*key, "uri"))
        if is_adapter(path) and find_spec("peft") is None:
            yield Problem((*key, "uri"), f"{path} is an adapter, which needs peft: pip install 'wmtp-core[lora]'")
        if is_adapter(path) and name == "base" and model.lora is not None:
            yield from _adapter_settings(path, model.lora, model.quantize)
        if method is None:
            continue
        if name == "base":
            yield Problem((*key, "uri"), quantized_problem(path, method))
        elif (needed := _NEEDS.get(method)) is not None and not any(map(find_spec, needed)):
            yield Problem(
                (*key, "uri"),
                f"{path} is quantized ({method}), for which transformers needs {' or '.join(needed)}; install it, or use the "
                "model in bf16 or fp32 that it was made from",
            )


def _adapter_settings(folder: Path, lora: LoraConfig, quantize: str | None) -> Iterator[Problem]:
    try:
        yield from other_settings(folder, lora, quantize)
    except WMTPError as error:
        yield Problem(("models", "base", "uri"), str(error))


def _target_problems(config: Config) -> Iterator[Problem]:
    """Report targets of adapters that are nowhere in a local model.

    A run looks at the model itself.
    """
    base = config.models.get("base")
    if base is None or base.loader.type != "hf" or base.lora is None or isinstance(base.lora.targets, str):
        return
    try:
        folder = None if getattr(base.loader, "gguf_file", None) else _local(base.loader.uri)
        if folder is None or not (folder / "config.json").is_file():
            return
        maps = linear_maps(read_json_object(folder / "config.json"))
    except WMTPError:  # said of the uri, or of the file
        return
    for index, target in enumerate(base.lora.targets):
        if maps is not None and (problem := maps.problem(target)) is not None:
            yield Problem(("models", "base", "lora", "targets", index), problem)


def _gguf_problems(config: Config) -> Iterator[Problem]:
    """Report damaged GGUF files, and layers that would be lost."""
    for name, model in config.models.items():
        if model.loader.type != "hf":
            continue
        try:
            path = _local(model.loader.uri)
            if path is not None and path.is_dir():
                path /= getattr(model.loader, "gguf_file", None) or find_gguf(path) or ""
        except WMTPError:  # said elsewhere
            continue
        if path is None or path.suffix != ".gguf" or not path.is_file():
            continue
        try:
            lost = lost_layers(path)
        except WMTPError as error:
            yield Problem(("models", name, "uri"), str(error))
            continue
        if lost is not None and name == "base" and model.lora is None:  # the base of an adapter is not saved
            yield Problem(("models", name, "uri"), lost)


def _local(uri: str | None) -> Path | None:
    """Return the local path of a model, if it has one.

    Raises:
        ConfigError: the URI is wrong.
    """
    if uri is None or scheme_of(uri) != "file" or not (path := file_path(uri)).exists() or special_kind(path):
        return None
    return model_within(cached_snapshot(path)) if path.is_dir() else path


def _no_model(path: Path) -> str | None:
    """Say what to name instead of a path that is no model.

    It may be a part of one, or a model of another loader.
    """
    if path.is_file() and path.suffix != ".gguf":
        folder = f"its folder, {path.parent}" if (path.parent / "config.json").exists() else "a model's folder"
        return f"{path} is a file; name {folder}, or a .gguf file"
    if (path / "params.json").exists() and not (path / "config.json").exists() and not is_adapter(path):
        return (
            f'{path} holds a params.json and no config.json; write type = "meta-mtp" if it is a multi-token checkpoint of Meta'
        )
    return None


def _template_problems(config: Config) -> Iterator[Problem]:
    """Report conversations for a local model that has no chat template."""
    base = config.models.get("base")
    if base is None or base.loader.type != "hf" or config.tokenizer is not None or config.data.train.chat_template is not None:
        return
    try:
        folder = _local(base.loader.uri)
        if folder is None or not folder.is_dir():
            return
        settings = folder / "tokenizer_config.json"
        if not settings.is_file() or "chat_template" in read_json_object(settings):
            return
    except WMTPError:  # said where it is opened
        return
    if (
        any(folder.glob("chat_template*"))
        or any((folder / "additional_chat_templates").glob("*"))
        or any(folder.glob("*.gguf"))
    ):
        return
    for name, dataset in config.datasets.items():
        if dataset.type == "chat":
            yield Problem(
                ("datasets", name),
                f"holds conversations, and {folder} has no chat template; name its instruct model, or "
                "set data.train.chat_template to a file with one, or to its text",
            )


def _draft_vocabulary_problems(config: Config) -> Iterator[Problem]:
    """Report a draft vocabulary larger than the base model's.

    Only where a small file or the config tells its size.
    """
    base = config.models.get("base")
    wanted = None if base is None or base.heads is None else base.heads.draft_vocabulary
    if base is None or wanted is None:
        return
    size = getattr(base.loader, "vocab_size", None)
    try:
        if base.loader.type == "hf" and (folder := _local(base.loader.uri)) is not None:
            content = read_json_object(folder / "config.json")
            size = content.get("vocab_size") or content.get("text_config", {}).get("vocab_size")
    except (WMTPError, AttributeError):  # said of the uri, or of the file
        return
    if isinstance(size, int) and wanted > size:
        key = ("models", "base", "heads", "draft_vocabulary")
        yield Problem(key, f"{wanted}, but the model has a vocabulary of {size}; write less, or leave it out")


def _length_problems(config: Config) -> Iterator[Problem]:
    """Report rows longer than a model's positions.

    Only where a small file or the config tells how many it has, and does not scale them; a run looks at the model itself.
    """
    wanted = config.data.train.max_length
    for name, model in config.models.items():
        try:
            longest = _positions(model.loader)
        except (WMTPError, AttributeError):  # said of the uri, or of the file
            continue
        if isinstance(longest, int) and wanted > longest:
            which = "the model" if name == "base" else f"[models.{name}]"
            said = f"{wanted}, but {which} has positions for {longest} tokens; write at most {longest}"
            yield Problem(("data", "train", "max_length"), said)


def _positions(loader: ModelLoaderConfig) -> object:
    if loader.type != "hf":
        return None if getattr(loader, "options", None) else getattr(loader, "max_positions", None)
    folder = None if getattr(loader, "gguf_file", None) else _local(loader.uri)
    if folder is None or not (folder / "config.json").is_file():
        return None
    content = read_json_object(folder / "config.json")
    content = content.get("text_config") or content
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    by_layer = any(isinstance(value, dict) for value in rope.values())
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return None if by_layer or scaled else content.get("max_position_embeddings", content.get("n_positions"))

"""Linear-head layout of distilgpt2-mtp: the model at ``base_model.*``, heads 2..H at ``extra_heads.{j}.weight``.

A head is an unembedding ``[V, D]``. ``config.json`` has ``mtp_config.n_future_tokens`` = H; the base model's own fields are at
its top level or in one of its tables.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from wmtp.config.schema import HeadsConfig
from wmtp.errors import FileError
from wmtp.models.loaders.files import config_from, read_bin, read_json, tensor_shapes, weight_files

__all__ = ["is_layout", "read_config", "read_tensors"]

_BASE = "base_model."
_HEADS = "extra_heads."
_LAYOUT_FIELDS = ("mtp_config", "auto_map", "architectures")
_log = logging.getLogger("wmtp")


def is_layout(folder: Path) -> bool:
    """Return True if the folder's ``config.json`` declares such heads."""
    file = folder / "config.json"
    return file.is_file() and "mtp_config" in read_json(file)


def read_config(folder: Path) -> tuple[PreTrainedConfig, HeadsConfig]:
    """Read the base model's config, and the heads.

    Raises:
        WMTPError: the config is incomplete, or its number of heads differs from that of the tensors.
    """
    file = folder / "config.json"
    content = read_json(file)
    mtp = content["mtp_config"]
    horizon = mtp.get("n_future_tokens") if isinstance(mtp, dict) else None
    if not isinstance(horizon, int) or horizon < 1:
        raise FileError(f"{file}: mtp_config.n_future_tokens must be a whole number ≥ 1, not {horizon!r}")
    shapes = _shapes(folder)
    heads = sorted(name for name in shapes if name.startswith(_HEADS))
    expected = sorted(f"{_HEADS}{index}.weight" for index in range(horizon - 1))
    if heads != expected:
        raise FileError(f"{folder}: mtp_config.n_future_tokens = {horizon} needs the tensors {expected}, but there are {heads}")
    return _base_config(file, content, shapes), HeadsConfig(kind="linear", horizon=horizon)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the tensors of base model and heads, without their prefixes.

    Raises:
        WMTPError: a tensor belongs to neither.
    """
    tensors = {name: tensor for file in weight_files(folder) for name, tensor in _load(file).items()}
    other = [name for name in tensors if not name.startswith((_BASE, _HEADS))]
    if other:
        raise FileError(f"{folder}: unexpected tensors, neither {_BASE}* nor {_HEADS}*: {', '.join(other)}")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return part(_BASE), part(_HEADS)


def _base_config(file: Path, content: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> PreTrainedConfig:
    tables = list(_tables(content))
    for table in tables:
        if table.get("model_type") in CONFIG_MAPPING:
            # the layout's own marks must not end up in a model that is saved in another layout
            return config_from(file, {key: value for key, value in table.items() if key not in _LAYOUT_FIELDS})
    embedding = shapes.get(f"{_BASE}transformer.wte.weight")
    positions = shapes.get(f"{_BASE}transformer.wpe.weight")
    if embedding is None or positions is None:
        raise FileError(f"{file}: names no model_type that transformers knows for the tensors {_BASE}*; add it")
    # GPT-2 by its tensors, which say every size but one
    layers = {name.split(".")[3] for name in shapes if name.startswith(f"{_BASE}transformer.h.")}
    heads = next((table["n_head"] for table in tables if "n_head" in table), None)
    if heads is None:
        heads = embedding[1] // 64
        _log.warning("%s: says no n_head; taken as %d, the 64-wide heads of every released GPT-2", file, heads)
    fields = {"vocab_size": embedding[0], "n_embd": embedding[1], "n_positions": positions[0], "n_layer": len(layers)}
    return config_from(file, {"model_type": "gpt2", "n_head": heads, **fields})


def _tables(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from _tables(value)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            shapes |= tensor_shapes(file)
        else:
            shapes |= {name: tuple(tensor.shape) for name, tensor in _load(file).items()}
    return shapes


def _load(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else read_bin(file)

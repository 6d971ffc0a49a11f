"""Model metadata without torch or transformers, where it is at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp.errors import WMTPError
from wmtp.json_files import DAMAGE
from wmtp.models.base import ModelInfo
from wmtp.models.config import FEED_FORWARD, HfModel, ScratchModel
from wmtp.plugins.contract import ModelLoaderConfig
from wmtp.storage.hub.names import cached_snapshot
from wmtp.storage.model_folders import model_within
from wmtp.storage.package import Package
from wmtp.storage.uris import file_path, scheme_of

__all__ = ["outline"]

#: architectures of transformers whose layers are Llama's: attention without bias, and a gated feed-forward layer
_LIKE_LLAMA = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "smollm3"})
#: linear maps of such a layer
_MAPS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def outline(loader: ModelLoaderConfig) -> ModelInfo | None:
    """Estimate a model's `ModelInfo` without torch; None where that is not possible.

    It is possible for models from scratch, and for Hugging Face folders and runs on this machine, of architectures built as
    Llama is.
    Biases, and norms inside attention, are left out: far less than 1 % of the parameters.
    """
    if isinstance(loader, ScratchModel):
        fields = {
            "model_type": loader.architecture,
            "vocab_size": loader.vocab_size,
            "hidden_size": loader.hidden_size,
            "num_hidden_layers": loader.layers,
            "num_attention_heads": loader.attention_heads,
            "num_key_value_heads": loader.kv_heads or loader.attention_heads,
            "intermediate_size": loader.intermediate_size or FEED_FORWARD * loader.hidden_size,
            "max_position_embeddings": loader.max_positions,
            "tie_word_embeddings": loader.tie_embeddings,
            **loader.options,
        }
        return _outline(fields)
    if isinstance(loader, HfModel):
        try:
            folder = _folder_here(loader.uri)
            return folder and _outline(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (OSError, WMTPError, *DAMAGE):
            return None  # its errors are reported by the code that must read it
    return None


def _folder_here(uri: str) -> Path | None:
    """Return the model folder that ``uri`` means.

    None where it would have to be fetched.
    """
    scheme = scheme_of(uri)
    if scheme not in ("file", "package"):
        return None
    return model_within(cached_snapshot(file_path(uri)) if scheme == "file" else Package().localize(uri, Path()))


def _outline(fields: Mapping[str, Any]) -> ModelInfo | None:
    if fields.get("model_type") not in _LIKE_LLAMA:
        return None
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    numbers = [number for name in names if isinstance(number := fields.get(name), int) and number > 0]
    if len(numbers) < len(names):
        return None
    vocab, width, layers, heads, ffn = numbers
    head_size = fields.get("head_dim") or width // heads
    queries, kv = heads * head_size, (fields.get("num_key_value_heads") or heads) * head_size
    parameters = 2 * width * queries + 2 * width * kv + 3 * width * ffn + 2 * width
    tables = 1 if fields.get("tie_word_embeddings") else 2
    return ModelInfo(
        architecture=fields["model_type"],
        parameters=layers * parameters + tables * vocab * width + width,
        layers=layers,
        layer_parameters=parameters,
        hidden_size=width,
        vocab_size=vocab,
        max_positions=fields.get("max_position_embeddings"),
        feed_forward_size=ffn,
        kv_size=kv,
        linear_maps=tuple(f"model.layers.{layer}.{name}" for layer in range(layers) for name in _MAPS),
    )

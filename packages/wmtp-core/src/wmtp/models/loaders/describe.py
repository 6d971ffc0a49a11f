"""A model's metadata, from its config alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.models.base import ModelInfo

__all__ = ["describe", "empty_model", "require_causal"]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of ``config`` without memory for its weights.

    Raises:
        ConfigError: it is not a causal language model.
    """
    require_causal(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def require_causal(config: PreTrainedConfig) -> None:
    """Whether there is a causal language model of this architecture.

    Raises:
        ConfigError: there is none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"models.base: transformers has no decoder-only causal language model of the architecture '{config.model_type}'"
        )


def describe(model: PreTrainedModel, heads: HeadsConfig | None = None) -> ModelInfo:
    """What `ModelInfo` says of ``model``, whose weights may be on the meta device."""
    config = model.config.get_text_config(decoder=True)
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise ConfigError(f"models.base: {type(model).__name__} has no unembedding: it is not a causal language model")
    return ModelInfo(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        layer_parameters=_layer_parameters(model, config.num_hidden_layers),
        hidden_size=unembedding.weight.shape[1],
        vocab_size=unembedding.weight.shape[0],
        max_positions=getattr(config, "max_position_embeddings", None),
        heads=heads,
        feed_forward_size=getattr(config, "intermediate_size", None),
        kv_size=_kv_size(config),
    )


def _kv_size(config: PreTrainedConfig) -> int | None:
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return (getattr(config, "num_key_value_heads", None) or heads) * size


def _layer_parameters(model: PreTrainedModel, layers: int) -> int:
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers)
    return max((sum(parameter.numel() for parameter in found[-1].parameters()) for found in lists), default=0)

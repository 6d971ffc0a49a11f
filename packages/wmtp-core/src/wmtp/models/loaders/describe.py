"""A model's metadata, from its config alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError, described
from wmtp.models.anatomy import find_layers
from wmtp.models.base import ModelInfo
from wmtp.models.config_fields import field, layer_count, max_positions, switching_length

__all__ = ["describe", "empty_model", "require_causal"]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of ``config`` without memory for its weights.

    Raises:
        ConfigError: it is not a causal language model, or the installed transformers cannot build it.
    """
    require_causal(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers' exceptions have no common base
        raise ConfigError(
            f"models.base: transformers cannot make this model: {described(error)} ('{config.model_type}', with "
            f"transformers {transformers.__version__})"
        ) from error


def require_causal(config: PreTrainedConfig) -> None:
    """Refuse an architecture without a causal language model.

    Raises:
        ConfigError: there is none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"models.base: transformers has no decoder-only causal language model of the architecture '{config.model_type}'; "
            "docs/models.md lists those that it has"
        )


def describe(model: PreTrainedModel, heads: HeadsConfig | None = None) -> ModelInfo:
    """Describe ``model``, whose weights may be on the meta device."""
    layers = layer_count(model.config)
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise ConfigError(f"models.base: {type(model).__name__} has no unembedding: it is not a causal language model")
    return ModelInfo(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=layers,
        layer_parameters=_layer_parameters(model, layers),
        hidden_size=unembedding.weight.shape[1],
        vocab_size=unembedding.weight.shape[0],
        max_positions=max_positions(model.config),
        switching_length=switching_length(model.config),
        heads=heads,
        feed_forward_size=_largest(field(model.config, "intermediate_size")),
        kv_size=_kv_size(model.config),
        linear_maps=_linear_maps(model),
    )


def _linear_maps(model: PreTrainedModel) -> tuple[str, ...]:
    try:
        layers = find_layers(model, model.base_model, ConfigError)
    except ConfigError:  # told where the layers are needed
        return ()
    inside = {id(module) for module in layers.modules()}
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside)


def _kv_size(config: PreTrainedConfig) -> int | None:
    heads = _largest(field(config, "num_attention_heads"))
    if heads is None:
        return None
    size = _largest(field(config, "head_dim")) or field(config, "hidden_size") // heads
    return (_largest(field(config, "num_key_value_heads")) or heads) * size


def _largest(value: Any) -> int | None:
    """Some architectures list a size for each layer."""
    values = [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, int)]
    return max(values, default=None)


def _layer_parameters(model: PreTrainedModel, layers: int) -> int:
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers)
    return max((sum(parameter.numel() for parameter in found[-1].parameters()) for found in lists), default=0)

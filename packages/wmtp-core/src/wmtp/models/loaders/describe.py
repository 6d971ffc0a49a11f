"""A model's metadata, from its config alone."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.models.base import ModelInfo

__all__ = ["describe", "empty_model"]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of ``config`` without memory for its weights.

    Raises:
        ConfigError: it is not a causal language model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError(
            f"models.base: '{config.model_type}' is not a causal language model that transformers knows"
        ) from error


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
        hidden_size=unembedding.weight.shape[1],
        vocab_size=unembedding.weight.shape[0],
        max_positions=getattr(config, "max_position_embeddings", None),
        heads=heads,
    )

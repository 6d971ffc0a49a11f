"""Fields of a model's config, nested in a text config or different from layer to layer, as the architecture has them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from wmtp.errors import ConfigError

__all__ = ["field", "layer_count", "layer_kinds", "max_positions", "text_config"]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of ``config`` that describes the decoder of text.

    Raises:
        ConfigError: there are several.
    """
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise ConfigError(
            f"models.base: the architecture '{config.model_type}' has several text models ({error}); give the folder of the "
            "one to train, saved by its own class"
        ) from error


def field(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """Return a field of the text model; of one that differs between layers, the largest value.

    Args:
        config: of the whole model.
        name: of the field.
        default: where there is no such field, or it is None.
    """
    text = text_config(config)
    try:
        value = getattr(text, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        values = [value for layer in text.per_layer_config if (value := getattr(layer, name, None)) is not None]
        value = max(values, default=None)
    return default if value is None else value


def layer_count(config: PreTrainedConfig) -> int:
    """Return the number of decoder layers.

    Raises:
        ConfigError: the config does not tell.
    """
    count = field(config, "num_hidden_layers")
    if not isinstance(count, int) or count < 1:
        raise ConfigError(
            f"models.base: the config of the architecture '{config.model_type}' has no num_hidden_layers ≥ 1: it is not one "
            "stack of decoder layers, which heads are put on; docs/models.md lists the architectures that can be trained"
        )
    return count


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return what each decoder layer does with earlier tokens, in transformers' words (``full_attention`` …).

    An architecture that does not tell has one kind for all: ``sliding_attention`` where it has a window, else
    ``full_attention``.
    """
    kinds = field(config, "layer_types")
    if kinds:
        return tuple(kinds)
    slides = field(config, "sliding_window") and field(config, "use_sliding_window", True)
    return ("sliding_attention" if slides else "full_attention",) * (field(config, "num_hidden_layers") or 1)


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest input; None where there is no limit."""
    return field(config, "max_position_embeddings")

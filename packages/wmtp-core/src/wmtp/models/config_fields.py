"""Fields of a model's config, wherever the architecture nests them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from wmtp.errors import ConfigError

__all__ = ["field", "layer_count", "layer_kinds", "max_positions", "switching_length", "text_config"]


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
    """Return a field of the text model's config.

    Where layers differ in it, the largest value.

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
    """Return each decoder layer's kind, by transformers' names.

    It says what the layer does with earlier tokens: ``full_attention``, say. An architecture that does not tell has one kind
    for all: ``sliding_attention`` where it has a window, else ``full_attention``.
    """
    kinds = field(config, "layer_types")
    if kinds:
        return tuple(kinds)
    slides = field(config, "sliding_window") and field(config, "use_sliding_window", True)
    return ("sliding_attention" if slides else "full_attention",) * (field(config, "num_hidden_layers") or 1)


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest input; None where there is no limit.

    Positions scaled by YaRN or dynamically reach further than ``max_position_embeddings``, which many a config leaves at the
    length of pretraining; other kinds of scaling come with the longer number.
    """
    longest = field(config, "max_position_embeddings")
    rope = _rope(config)
    factor = rope.get("factor")
    if not isinstance(longest, int) or rope.get("rope_type") not in ("yarn", "dynamic") or not isinstance(factor, int | float):
        return longest
    return max(longest, int(factor * (rope.get("original_max_position_embeddings") or longest)))


def switching_length(config: PreTrainedConfig) -> int | None:
    """Return the length beyond which positions are scaled by text length.

    None where they are not. LongRoPE has one set of frequencies up to it and another one beyond, dynamic scaling a set for
    every length: in a row of several documents the longest decides for all.
    """
    rope = _rope(config)
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return None
    return rope.get("original_max_position_embeddings") or field(config, "max_position_embeddings")


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    rope = field(config, "rope_parameters")
    return rope if isinstance(rope, dict) else {}

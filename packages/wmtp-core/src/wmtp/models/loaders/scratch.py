"""New models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from wmtp.errors import ConfigError, described
from wmtp.models.base import LoadedModel, ModelInfo, ModelLoader
from wmtp.models.config import FEED_FORWARD
from wmtp.models.drawing import seeded
from wmtp.models.loaders.describe import describe, empty_model, require_causal
from wmtp.spelling import did_you_mean

if TYPE_CHECKING:
    from wmtp.models.config import ScratchModel

__all__ = ["ScratchLoader"]

# key of [models.base] → transformers' name
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "attention_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_FEED_FORWARD_FIELDS = ("intermediate_size", "ffn_dim")
# defaults that belong to the vocabulary of some released model, and would be wrong ids here
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class ScratchLoader(ModelLoader):
    """Makes a model from its shape.

    Args:
        shape: the config section.
    """

    def __init__(self, shape: ScratchModel) -> None:
        self._shape = shape

    def info(self, path: Path | None) -> ModelInfo:
        """See `ModelLoader.info`."""
        return describe(_checked(lambda: empty_model(self._config())))

    def load(self, path: Path | None, *, dtype: torch.dtype, seed: int) -> LoadedModel:
        """See `ModelLoader.load`."""
        config = self._config()
        require_causal(config)
        with seeded(seed):
            model: PreTrainedModel = _checked(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
        return LoadedModel(model=model.eval())

    def _config(self) -> PreTrainedConfig:
        name = self._shape.architecture
        default = _default_config(name)
        known = set(default.to_dict()) | set(default.attribute_map)
        fields: dict[str, Any] = dict.fromkeys(_SPECIAL_TOKENS)
        problems = []
        for key, field in _FIELDS.items():
            value = getattr(self._shape, key)
            if key == "kv_heads" and value is None and field in known:
                value = self._shape.attention_heads
            if value is None:
                continue
            if field in known:
                fields[field] = value
            else:
                problems.append(f"models.base.{key}: '{name}' has no {field}; see models.base.options for its own fields")
        for key, value in self._shape.options.items():
            if key in known and key not in _FIELDS.values():
                fields[key] = value
            elif key in known:
                own = next(ours for ours, theirs in _FIELDS.items() if theirs == key)
                problems.append(f"models.base.options.{key}: write models.base.{own} instead")
            else:
                hint = did_you_mean(key, known)
                problem = f"models.base.options.{key}: the config of '{name}' has no such field"
                problems.append(f"{problem}; {hint}" if hint else problem)
        if problems:
            raise ConfigError(problems)
        config = _checked(lambda: AutoConfig.for_model(name, **fields))
        width = self._shape.intermediate_size or FEED_FORWARD * self._shape.hidden_size
        # a width of some released model, which does not follow from this one's, would be most of a small model
        fixed = [field for field in _FEED_FORWARD_FIELDS if _is_fixed(field, config, default) and field not in fields]
        return _checked(lambda: AutoConfig.for_model(name, **fields, **dict.fromkeys(fixed, width))) if fixed else config


def _default_config(name: str) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    if name not in CONFIG_MAPPING:
        hint = did_you_mean(name, CONFIG_MAPPING.keys())
        raise ConfigError(f"models.base.architecture: transformers knows no '{name}'{f'; {hint}' if hint else ''}")
    return AutoConfig.for_model(name)


def _is_fixed(field: str, config: PreTrainedConfig, default: PreTrainedConfig) -> bool:
    """Tell a field that the model's size has left as it was."""
    number = getattr(default, field, None)
    return isinstance(number, int) and getattr(config, field) == number


def _checked(make: Any) -> Any:
    """Turn transformers' errors into the user's mistakes.

    They come of numbers that do not go together: a width that the heads do not divide, say.
    """
    try:
        return make()
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        # transformers' exceptions have no common base
        raise ConfigError(f"models.base: transformers cannot make this model: {described(error)}") from error

"""Reward models: sequence classifiers with one output.

It says how good a whole text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from wmtp.errors import ConfigError
from wmtp.models.config_fields import max_positions, text_config
from wmtp.models.loaders.files import read_config, weight_files
from wmtp.models.loaders.hf import strict_from_pretrained
from wmtp.tokenizers.hf import open_auto_tokenizer

__all__ = ["RewardModel", "check_reward_model"]


def check_reward_model(path: Path, key: str) -> PreTrainedConfig:
    """Refuse a folder that holds no reward model, by its metadata alone.

    Args:
        path: the folder.
        key: the config section that a message blames.

    Raises:
        ConfigError: it is no sequence classifier with one output.
        WMTPError: files are missing or damaged.
    """
    if not path.is_dir():
        raise ConfigError(f"{key}.uri: {path} is no folder; a reward model is a folder that transformers opens")
    config = read_config(path)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(f"{key}: transformers has no sequence classifier of the architecture '{config.model_type}'")
    named = config.architectures or []
    if config.num_labels != 1 or not any(name.endswith("ForSequenceClassification") for name in named):
        raise ConfigError(
            f"{key}: {path} holds {', '.join(named) or config.model_type} with {config.num_labels} output(s), not a reward "
            "model: a model for sequence classification with one output (num_labels = 1)"
        )
    weight_files(path)
    open_auto_tokenizer(path)
    return config


class RewardModel:
    """A frozen sequence classifier with one output, and its own tokenizer.

    Args:
        path: the folder.
        key: the config section that a message blames.
        dtype: of its parameters.
        device: where it computes.
        attn_implementation: the attention kernel; None leaves it to transformers.

    Raises:
        ConfigError: it is no reward model.
        WMTPError: a tensor is missing, the score's among them, or files are damaged.
    """

    def __init__(
        self, path: Path, *, key: str, dtype: torch.dtype, device: torch.device, attn_implementation: str | None = None
    ) -> None:
        options: dict[str, Any] = {"config": check_reward_model(path, key), "dtype": dtype}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        self._tokenizer: PreTrainedTokenizerBase = open_auto_tokenizer(path)
        self._tokenizer.truncation_side = "left"  # the score depends on the end of a text
        model: PreTrainedModel = strict_from_pretrained(AutoModelForSequenceClassification, path, path, options)
        self._model = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
        self._longest = max_positions(model.config)

    def tokens(self, text: str) -> tuple[list[int], bool]:
        """Tokenize a text, and tell whether its start was cut off.

        Special tokens are added as the tokenizer does.
        """
        ids = self._tokenizer(text)["input_ids"]
        if self._longest is None or len(ids) <= self._longest:
            return ids, False
        return self._tokenizer(text, truncation=True, max_length=self._longest)["input_ids"], True

    @torch.no_grad()
    def scores(self, texts: Sequence[list[int]]) -> list[float]:
        """Score some texts, given as ids, by one forward pass."""
        pad = self._padding(texts)
        if pad is None and len(texts) > 1:
            return [score for text in texts for score in self.scores([text])]
        longest = max(len(ids) for ids in texts)
        rows = [ids + [pad or 0] * (longest - len(ids)) for ids in texts]
        mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts]
        device = self._model.device
        output = self._model(input_ids=torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device))
        return output.logits[:, 0].float().tolist()

    def _padding(self, texts: Sequence[list[int]]) -> int | None:
        """An id to fill rows with; None where there is none.

        A decoder takes the score from the last token that is not padding, which it knows by its id alone. So where the
        tokenizer has no id for padding only, it is one that no text of the batch has.
        """
        text = text_config(self._model.config)
        own: int | None = self._tokenizer.pad_token_id  # type: ignore[assignment]
        used = {token for ids in texts for token in ids}
        pad = (
            own
            if own is not None and own not in used
            else next(number for number in range(len(used) + 1) if number not in used)
        )
        pad = None if pad >= text.vocab_size else pad
        self._model.config.pad_token_id = text.pad_token_id = pad
        return pad

"""Reward-model scores of the training data.

Computed once and cached beside the tokens.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from wmtp.data.score_cache.cached_numbers import numbers_path
from wmtp.data.score_cache.document_numbers import DocumentNumbers
from wmtp.errors import WMTPError

if TYPE_CHECKING:
    from wmtp.config.schema import Config
    from wmtp.data.dataset import TokenDataset
    from wmtp.models.reward import RewardModel
    from wmtp.tokenizers import Tokenizer
    from wmtp.trainers.setup import RewardScores
    from wmtp.training.setup import Source

__all__ = ["document_text", "open_reward_scores"]

_SECONDS_BETWEEN_LINES = 30.0
_log = logging.getLogger("wmtp")


def open_reward_scores(config: Config, source: Source, dataset: TokenDataset, device: torch.device) -> RewardScores:
    """Return the function behind `TrainerSetup.reward_scores`."""
    from wmtp.models.reward import RewardModel

    def score(name: str, *, template: str, dtype: torch.dtype, batch_size: int) -> DocumentNumbers:
        key, loader = f"models.{name}", config.models[name].loader
        what = f"reward {template!r} {dtype}"
        numbers = DocumentNumbers(numbers_path(config, source, dataset, name, what, "rewards.f32"), dataset)
        if len(numbers.missing):
            path = source.place.path(loader, key) or Path()
            attention = loader.attn_implementation
            model = RewardModel(path, key=key, dtype=dtype, device=device, attn_implementation=attention)
            _fill(numbers, model, dataset, source.tokenizer, template, batch_size, key)
        return numbers

    return score


def document_text(dataset: TokenDataset, piece: int, tokenizer: Tokenizer, template: str) -> str:
    """Fill ``{prompt}`` and ``{completion}`` of a template from one document."""
    found = dataset.document(piece)
    tokens = found.tokens.tolist()
    prompt, completion = (tokenizer.decode(part) for part in (tokens[: found.prompt_length], tokens[found.prompt_length :]))
    before, _, after = template.partition("{completion}")
    return before.replace("{prompt}", prompt) + completion + after.replace("{prompt}", prompt)


def _fill(
    numbers: DocumentNumbers,
    model: RewardModel,
    dataset: TokenDataset,
    tokenizer: Tokenizer,
    template: str,
    batch_size: int,
    key: str,
) -> None:
    """Compute the missing scores.

    Texts of like length together, the longest first, so that a full memory shows at once.
    """
    missing = numbers.missing
    _log.info("%s: scoring %s documents", key, f"{len(missing):,}")
    order = missing[np.argsort(-dataset.lengths[missing], kind="stable")]
    began = said = time.monotonic()
    cut = 0
    for start in range(0, len(order), batch_size):
        pieces = order[start : start + batch_size]
        encoded = [model.tokens(document_text(dataset, int(piece), tokenizer, template)) for piece in pieces]
        cut += sum(was_cut for _, was_cut in encoded)
        scores = np.array(model.scores([ids for ids, _ in encoded]), np.float32)
        if not np.isfinite(scores).all():
            document = dataset.document(int(pieces[~np.isfinite(scores)][0])).document
            raise WMTPError(f"{key}: the score of '{document.id}' in datasets.{document.source} is not a finite number")
        numbers.put(pieces, scores)
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            _log.info("%s: %s of %s documents", key, f"{start + len(pieces):,}", f"{len(order):,}")
    if cut:
        _log.warning("%s: %s documents are longer than it can read; their starts were cut off", key, f"{cut:,}")
    _log.info("%s: scored in %.1f s", key, time.monotonic() - began)

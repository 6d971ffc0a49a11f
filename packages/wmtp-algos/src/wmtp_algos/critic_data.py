"""Data rules of critic-wmtp: rewards, and which documents are correct."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wmtp.errors import WMTPError
from wmtp_algos.pairs import pair_documents

if TYPE_CHECKING:
    from wmtp.data.base import Document
    from wmtp.data.dataset import TokenDataset
    from wmtp_algos.critic_config import CriticWMTP

__all__ = ["check_rewards", "correct_documents", "is_correct", "reward_of"]

Flags = NDArray[np.bool_]


def reward_of(document: Document) -> float:
    """R by the data: the ``reward``, else 1 or 0 by ``is_correct``.

    Raises:
        WMTPError: the document has neither.
    """
    if document.reward is not None:
        return document.reward
    if document.is_correct is None:
        raise WMTPError(f"datasets.{document.source}: '{document.id}' has neither is_correct nor reward")
    return float(document.is_correct)


def is_correct(config: CriticWMTP, document: Document) -> bool:
    """Tell whether a document is correct, by its label or its reward.

    ``is_correct`` decides where it is given, else a ``reward`` of at least ``correct_reward``.

    Raises:
        WMTPError: the document has neither.
    """
    return document.is_correct if document.is_correct is not None else reward_of(document) >= config.correct_reward


def correct_documents(config: CriticWMTP, data: TokenDataset) -> Flags:
    """`is_correct` of every piece; False where nothing is known."""
    labels = data.is_correct
    return np.where(labels >= 0, labels == 1, data.rewards >= config.correct_reward)  # NaN is not


def check_rewards(config: CriticWMTP, data: TokenDataset) -> list[str]:
    """Report data problems for this config, one line each; see `wmtp.trainers.Trainer.check_data`."""
    learns_value = config.value_head is None or config.value_learns
    labels, rewards = data.is_correct, data.rewards
    known = (labels >= 0) | ~np.isnan(rewards)
    needs = []
    if config.reward == "verifiable":
        needs.append(("reward = 'verifiable'", "set trainer.reward = 'model'"))
    if config.train_on == "correct":
        needs.append(("train_on = 'correct'", "set trainer.train_on = 'all'"))
    if config.value_loss == "pairwise" and learns_value:
        needs.append(("value_loss = 'pairwise'", "set trainer.value_loss = 'lambda-return'"))
    if needs and (problems := list(_unlabelled(data, known, *needs[0]))):
        return problems
    where = ", ".join(f"datasets.{name}" for name in data.names)
    correct = correct_documents(config, data)
    if config.reward == "verifiable" and learns_value:
        values = np.where(np.isnan(rewards), labels, rewards)
        if values.min() == values.max():
            return [
                f"{where}: all {len(data):,} documents have the same reward, {values[0]:g}, so there is no value to learn; add "
                "documents that are better or worse (wrong answers, with is_correct = false)"
            ]
    if config.value_loss == "pairwise" and learns_value and (problem := _without_pairs(config, data, correct)):
        return [f"{where}: {problem}"]
    if config.train_on == "correct" and not correct.any():
        return [
            f"{where}: none of the {len(data):,} documents is correct, and trainer.train_on = 'correct' learns no other; add "
            f"correct ones, or set trainer.train_on = 'all'"
        ]
    return []


def _unlabelled(data: TokenDataset, known: Flags, key: str, otherwise: str) -> Iterator[str]:
    """One line for each source that has documents without is_correct and reward."""
    sources = data.sources
    for number, name in enumerate(data.names):
        own = sources == number
        missing = own & ~known
        if not missing.any():
            continue
        said = f"none of its {own.sum():,} documents has is_correct or a reward"
        if missing.sum() < own.sum():
            example = data.document(int(missing.argmax())).document.id
            said = (
                f"{missing.sum():,} of its {own.sum():,} documents (the first is '{example}') have no is_correct and no reward"
            )
        yield (
            f"datasets.{name}: {said}, which trainer.{key} needs; label all documents, leave out those without, or {otherwise}"
        )


def _without_pairs(config: CriticWMTP, data: TokenDataset, correct: Flags) -> str | None:
    """Why there is no pair, where there is none."""
    pairs = pair_documents(data.groups, correct, data.learned_lengths, config.pair_length_ratio)
    if (pairs >= 0).any():
        return None
    need = "trainer.value_loss = 'pairwise' needs a correct and an incorrect answer to the same problem"
    if correct.all() or not correct.any():
        kind = "correct" if correct.all() else "incorrect"
        return f"all {len(data):,} documents are {kind}; {need}; add {'in' * (kind == 'correct')}correct ones of the same group"
    if (pair_documents(data.groups, correct, data.learned_lengths, np.inf) >= 0).any():
        return (
            f"no two answers to one problem, one correct and one not, are of about equal length; raise "
            f"trainer.pair_length_ratio = {config.pair_length_ratio:g}"
        )
    return f"no problem (group) has both; {need}; give answers to one problem the same group"

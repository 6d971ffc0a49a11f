"""Setup of an algorithm, before step 1. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from attrs import frozen

if TYPE_CHECKING:
    import torch

    from wmtp.data.score_cache.document_numbers import DocumentNumbers
    from wmtp.data.score_cache.token_numbers import TokenNumbers
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = ["OpenModel", "RewardScores", "TrainerSetup"]


class OpenModel(Protocol):
    """Loader of another ``[models.*]``."""

    def __call__(self, name: str, *, dtype: torch.dtype = ..., device: torch.device | None = ...) -> MTPModel:
        """Load the model of ``[models.<name>]``: head 1 alone, frozen, in eval mode.

        Args:
            name: a section listed in the config class's ``required_models``; its vocabulary is known to be the run's.
            dtype: of its parameters; default: ``torch.float32``.
            device: where it computes; default: the device of the trained model.

        Raises:
            ConfigError: the config has no such section, or this machine no such device.
            WMTPError: the files are missing or damaged.
        """
        ...


class RewardScores(Protocol):
    """Scorer of the training data by a reward model."""

    def __call__(self, name: str, *, template: str, dtype: torch.dtype, batch_size: int) -> DocumentNumbers:
        """Score all documents with the model of ``[models.<name>]``; cached beside the tokens.

        The result's ``values`` has a score for each piece of the training data, in its order.

        Args:
            name: a section listed in the config class's ``reward_models``.
            template: the model's input, with ``{prompt}`` and ``{completion}``.
            dtype: of its parameters.
            batch_size: documents scored at once.

        Raises:
            ConfigError: the model is no sequence classifier with one output.
            WMTPError: files are missing or damaged, or a score is not finite.
        """
        ...


def _no_data(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("this setup comes without training data and files")


@frozen(kw_only=True, eq=False)
class TrainerSetup:
    """Inputs of `Trainer.setup`, given once before the first step.

    Args:
        hidden_size: D.
        vocab_size: V.
        horizon: H.
        device: where the model is.
        seed: the run's seed.
        tokenizer: the tokenizer of the data.
        model: loads another ``[models.*]``: ``model("ref", dtype=torch.bfloat16)`` is an `MTPModel` with head 1 alone, frozen,
            in eval mode; see `OpenModel`.
        token_numbers: opens the cache file of numbers that another ``[models.*]`` computes for each training token. The first
            text is the model's name, the second identifies the computation. Another text, other data, another tokenizer or a
            changed model use another file.
        reward_scores: the scores that a reward model gives to the training data; see `RewardScores`.
        fetch: the local path of a URI; the second text is the key that an error message blames.
    """

    hidden_size: int
    vocab_size: int
    horizon: int
    device: torch.device
    seed: int
    tokenizer: Tokenizer
    model: OpenModel
    token_numbers: Callable[[str, str], TokenNumbers]
    reward_scores: RewardScores = _no_data
    fetch: Callable[[str, str], Path] = _no_data

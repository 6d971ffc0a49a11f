"""Setup of an algorithm before its first step. Importing it imports no torch."""

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
    """Loads another ``[models.*]``."""

    def __call__(self, name: str, *, dtype: torch.dtype = ..., device: torch.device | None = ...) -> MTPModel:
        """The model of the section ``[models.<name>]``: head 1 alone, frozen, in eval mode.

        Args:
            name: a section that the config class has in ``required_models``: its vocabulary is then known to be the run's.
            dtype: of its parameters; default: ``torch.float32``.
            device: where it computes; default: where the trained model does.

        Raises:
            ConfigError: the config has no such section, or this machine no such device.
            WMTPError: the files are missing or damaged.
        """
        ...


class RewardScores(Protocol):
    """Scores the training data with a reward model."""

    def __call__(self, name: str, *, template: str, dtype: torch.dtype, batch_size: int) -> DocumentNumbers:
        """The scores of all documents by the section ``[models.<name>]``, computed now unless they are kept beside the tokens.

        Args:
            name: a section that the config class has in ``reward_models``.
            template: what the model reads, with ``{prompt}`` and ``{completion}``.
            dtype: of its parameters.
            batch_size: documents that are scored at once.

        Raises:
            ConfigError: it is no sequence classifier with one output.
            WMTPError: files are missing or damaged, or a score is not a finite number.
        """
        ...


def _no_data(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("this setup comes without training data and files")


@frozen(kw_only=True, eq=False)
class TrainerSetup:
    """What an algorithm is given once, before the first step.

    Args:
        hidden_size: D.
        vocab_size: V.
        horizon: H.
        device: where the model is.
        seed: the run's seed.
        tokenizer: what made the tokens.
        model: loads another ``[models.*]``: ``model("ref", dtype=torch.bfloat16)`` is an `MTPModel` with head 1 alone, frozen,
            in eval mode; see `OpenModel`.
        token_numbers: opens the file of what another ``[models.*]`` makes of each token of the training data, kept beside the
            tokens: of the model of this name, computed as the second text says. Another text, other data, another tokenizer
            or a changed model have another file.
        reward_scores: the scores that a reward model gives to the training data; see `RewardScores`.
        fetch: the local path of a URI; the second text is the key that a message blames.
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

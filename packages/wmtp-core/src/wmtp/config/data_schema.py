"""Section ``[data]``: the data sets, and how rows are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from attrs import Attribute, Factory, field, frozen
from attrs.validators import ge, gt, lt, min_len, optional

__all__ = ["DataConfig", "EvalDataConfig", "TrainDataConfig"]


def _positive_numbers(_: object, attribute: Attribute[Mapping[str, float]], value: Mapping[str, float]) -> None:
    for name, number in value.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{attribute.name}: {name} = {number} must be a number above 0")


@frozen(kw_only=True)
class TrainDataConfig:
    """Training data, and how it becomes batches.

    Args:
        sources: names of ``[datasets.*]`` tables. Default: all of them that ``[data.eval]`` does not name.
        mixture: in place of ``sources``: data sets by name, and what share of the tokens each gives, as
            ``{ code = 0.7, chat = 0.3 }``. A data set begins again when it has been read; an epoch has as many rows as all of
            them together.
        max_length: tokens in one row of a batch.
        batch_size: rows in one optimizer step of the whole job, over all devices.
        micro_batch_size: rows that one device computes at once. It changes memory and speed, never the result.
            Default: ``batch_size``.
        packing: true puts several documents into a row, which never see or predict each other; false gives a document a
            row, padded, and puts rows of like length together.
        learn: the tokens to learn: of conversations those of every ``assistant`` turn (the default) or of the ``last`` alone,
            of other documents the completion; ``all`` adds prompts, user turns and everything that the template writes.
        learn_prompt: older name: true is ``learn = "all"``.
        boundary: ``apart`` encodes a prompt and its completion separately, so that no token spans the two; ``together`` encodes
            the whole text, as other programs do, and trains on a token that spans them.
        chat_template: template of conversations: a Jinja template, or a file with one. Default: the model's own.
        prompt_weights: by name of a data set, a number that multiplies the weights of prompt tokens, which are then learned,
            under every trainer: ``prompt_weights = { chat = 0.1 }``.
        response_weights: by name of a data set, a number that multiplies the weights of all other learned tokens.
        overlong: treatment of a document of more than ``max_length`` tokens: ``truncate`` it, ``skip`` it, or
            ``split`` it into several.
        on_bad_example: ``error`` stops at the first line that cannot be read, ``skip`` leaves it out and reports how many.
        shuffle: a new order in each epoch, by ``run.seed``; false keeps the order of the files.
    """

    sources: tuple[str, ...] | None = None
    mixture: Mapping[str, float] | None = None
    max_length: int = field(default=1024, validator=ge(2))
    batch_size: int = field(default=8, validator=ge(1))
    micro_batch_size: int | None = field(default=None, validator=optional(ge(1)))
    packing: bool = True
    learn: Literal["assistant", "last", "all"] | None = None
    learn_prompt: bool | None = None
    boundary: Literal["apart", "together"] = "apart"
    chat_template: str | None = field(default=None, validator=optional(min_len(1)))
    prompt_weights: Mapping[str, float] = field(factory=dict, validator=_positive_numbers)
    response_weights: Mapping[str, float] = field(factory=dict, validator=_positive_numbers)
    overlong: Literal["truncate", "skip", "split"] = "truncate"
    on_bad_example: Literal["error", "skip"] = "error"
    shuffle: bool = True

    @property
    def learned(self) -> Literal["assistant", "last", "all"]:
        """Name what is learned, under either key."""
        return "all" if self.learn_prompt else self.learn or "assistant"


@frozen(kw_only=True)
class EvalDataConfig:
    """Data measured during training and never trained on.

    Rows are made as in ``[data.train]``.

    Args:
        sources: names of ``[datasets.*]`` tables.
        holdout: instead of ``sources``: this share of the training documents, chosen by ``run.seed``.
        batch_size: rows computed at once. Default: the micro-batch of training.
        max_batches: measure at most this many batches, of ``batch_size`` rows or else of ``data.train.batch_size``. Default:
            all.
    """

    sources: tuple[str, ...] | None = None
    holdout: float | None = field(default=None, validator=optional([gt(0.0), lt(1.0)]))
    batch_size: int | None = field(default=None, validator=optional(ge(1)))
    max_batches: int | None = field(default=None, validator=optional(ge(1)))


@frozen(kw_only=True)
class DataConfig:
    """Training and evaluation data.

    Args:
        train: the training data.
        eval: the evaluation data; none by default.
        cache_dir: where tokenized data is kept, by content. Default: ``.cache/tokens`` in ``run.output_dir``.
    """

    train: TrainDataConfig = Factory(TrainDataConfig)
    eval: EvalDataConfig | None = None
    cache_dir: str | None = None

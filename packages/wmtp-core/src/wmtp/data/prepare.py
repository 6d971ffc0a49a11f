"""Preparation of training and evaluation data, from config to tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from wmtp.config.data_rules import eval_sources, require_sources, train_sources
from wmtp.config.schema import Config, TrainDataConfig
from wmtp.data.cache import token_store
from wmtp.data.dataset import TokenDataset
from wmtp.data.remarks import remarks, template_remark
from wmtp.errors import ConfigError, FileError
from wmtp.tokenizers.base import Tokenizer
from wmtp.tokenizers.chat_template import template_source

__all__ = ["PreparedData", "prepare_data", "prepare_eval_data", "token_cache_dir", "use_chat_template"]

_log = logging.getLogger("wmtp")


@frozen(kw_only=True, eq=False)
class PreparedData:
    """Training and evaluation data of a run.

    Args:
        train: the training data.
        eval: the evaluation data; None where the config asks for none.
    """

    train: TokenDataset
    eval: TokenDataset | None


def prepare_data(config: Config, tokenizer: Tokenizer, paths: Mapping[str, Path | None]) -> PreparedData:
    """Read, tokenize (once, see `wmtp.data.cache`) and split the data.

    Args:
        config: the whole config.
        tokenizer: what makes the tokens.
        paths: for each data set that the config learns from or measures, the local place of its ``uri``.

    Raises:
        ConfigError: the config names data sets that are missing, or trains on one that is for evaluation only.
        WMTPError: a data set cannot be read, is empty, or has nothing to learn; the message names it.
    """
    require_sources(config)
    train_names, eval_names = train_sources(config), eval_sources(config)
    train = _dataset(config, tokenizer, paths, train_names, "data.train")
    if config.data.eval is None:
        return PreparedData(train=train, eval=None)
    if config.data.eval.holdout is not None:
        train, held_out = split_by_group(train, config.data.eval.holdout, config.run.seed, train_names)
        _log.info("data.eval: %s documents held out of %s", f"{len(held_out):,}", f"{len(held_out) + len(train):,}")
        return PreparedData(train=train, eval=held_out)
    return PreparedData(train=train, eval=_dataset(config, tokenizer, paths, eval_names, "data.eval"))


def prepare_eval_data(config: Config, tokenizer: Tokenizer, paths: Mapping[str, Path | None]) -> TokenDataset:
    """Prepare the evaluation data alone; see `prepare_data`.

    A holdout needs the training data that it is taken from.

    Raises:
        ConfigError: ``[data.eval]`` is missing or wrong.
        WMTPError: as for `prepare_data`.
    """
    if config.data.eval is None or config.data.eval.holdout is not None:
        held_out = prepare_data(config, tokenizer, paths).eval
        if held_out is None:
            raise ConfigError("data.eval: missing: it names the evaluation data")
        return held_out
    names = eval_sources(config)
    if wrong := [name for name in names if name not in config.datasets] or ([] if names else ["(none)"]):
        there = ", ".join(config.datasets)
        raise ConfigError([f"data.eval.sources: there is no [datasets.{name}]; there are: {there}" for name in wrong])
    return _dataset(config, tokenizer, paths, names, "data.eval")


def use_chat_template(tokenizer: Tokenizer, data: TrainDataConfig) -> None:
    """Give the tokenizer the chat template of ``[data.train]``, if any.

    It is saved with the model.

    Raises:
        ConfigError: there is no such file.
    """
    if data.chat_template is not None:
        try:
            tokenizer.chat_template = template_source(data.chat_template)
        except ConfigError as error:
            raise error.under("data.train.chat_template") from error


def token_cache_dir(config: Config) -> Path:
    """Where tokenized data is kept."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir).expanduser()
    return Path(config.run.output_dir) / ".cache" / "tokens"


def _dataset(
    config: Config, tokenizer: Tokenizer, paths: Mapping[str, Path | None], names: Sequence[str], key: str
) -> TokenDataset:
    data = config.data.train
    cache_dir = token_cache_dir(config)
    stores = [
        token_store(
            name,
            config.datasets[name],
            paths[name],
            tokenizer,
            cache_dir=cache_dir,
            on_bad_example=data.on_bad_example,
            learn=data.learned,
            boundary=data.boundary,
        )
        for name in names
    ]
    options = {
        "max_length": data.max_length,
        "overlong": data.overlong,
        "learn_prompt": data.learned == "all",
        "pad_id": tokenizer.eos_id,
        "prompt_weights": data.prompt_weights,
        "response_weights": data.response_weights,
    }
    for name, store in zip(names, stores, strict=True):
        alone = TokenDataset([store], names=[name], **options)
        for level, line in remarks(store, alone, data.max_length):
            _log.log(level, "%s: %s: %s", key, name, line)
        _log.info("%s", _summary(f"{key}: {name}", alone))
        if not len(alone):
            raise FileError(f"datasets.{name}: {_nothing_to_learn(alone, data.max_length)}")
    if key == "data.train" and (line := template_remark(dict(zip(names, stores, strict=True)), tokenizer)) is not None:
        _log.warning("%s: %s", key, line)
    return TokenDataset(stores, names=names, **options)


def _summary(title: str, dataset: TokenDataset) -> str:
    counts = dataset.counts
    parts = [f"{counts.documents:,} documents", f"{dataset.tokens:,} tokens", f"{dataset.learned_tokens:,} learned"]
    for number, what in (
        (counts.truncated, "truncated"),
        (counts.split, "split"),
        (counts.overlong, "too long and left out"),
        (counts.without_target - len(counts.cut_off), "left out with nothing to learn"),
        (len(counts.cut_off), "left out because truncation cuts off all that would be learned"),
        (counts.bad, "bad and left out"),
    ):
        if number:
            parts.append(f"{number:,} {what}")
    return f"{title}: {', '.join(parts)}"


def _nothing_to_learn(dataset: TokenDataset, max_length: int) -> str:
    counts = dataset.counts
    said = f"none of its {counts.documents:,} documents has a token to learn after its first"
    if counts.overlong:
        return f"{said}; {counts.overlong:,} are longer than data.train.max_length = {max_length} and left out"
    if counts.truncated:
        return f"{said} once cut to data.train.max_length = {max_length}; raise it, or set data.train.learn = 'all'"
    return f"{said}; is it the right file?"


def split_by_group(dataset: TokenDataset, share: float, seed: int, names: Sequence[str]) -> tuple[TokenDataset, TokenDataset]:
    """Hold out about ``share`` of the documents, in whole groups.

    All answers to one problem stay together. Groups are taken in the order of a hash of seed, data set and group until the
    share is reached; at least one group is on each side.

    Args:
        dataset: what is split.
        share: between 0 and 1.
        seed: of the choice.
        names: the data sets' names, in the order of ``dataset``'s sources.

    Returns:
        What is left to learn from, and what is held out.

    Raises:
        FileError: there is only one group.
    """
    keys = np.concatenate(
        [_mixed(hashes, f"{seed}\0{name}") for hashes, name in zip(dataset.group_hashes(), names, strict=True)]
    )
    indices = np.unique(dataset.indices)
    groups, documents = np.unique(keys[indices], return_counts=True)
    if len(groups) < 2:
        raise FileError(
            f"data.eval.holdout: {', '.join(names)} has {len(indices)} document(s) in one group, which cannot be split;"
            " give data.eval.sources instead"
        )
    taken = int(np.searchsorted(np.cumsum(documents), share * len(indices))) + 1
    held_out = keys[dataset.indices] <= groups[min(taken, len(groups) - 1) - 1]
    return dataset.select(~held_out), dataset.select(held_out)


def _mixed(hashes: NDArray[np.uint64], salt: str) -> NDArray[np.uint64]:
    """Rehash each hash with ``salt``; equal ones stay equal.

    It is the finalizer of SplitMix64.
    """
    mixed = hashes ^ np.uint64(int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8]))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

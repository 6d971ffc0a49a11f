"""Comparison of tokenizers with each other and with a model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from wmtp.errors import ConfigError

if TYPE_CHECKING:
    from wmtp.data.dataset import TokenDataset
    from wmtp.tokenizers.base import Tokenizer

__all__ = ["check_ids", "check_reading", "check_vocabulary", "compare_tokenizers"]

# models round their vocabulary up, for speed; by more than this none does
_MOST_PADDING = 1024
# ids that are compared of two tokenizers which are allowed to differ in some
_SAMPLE = 1000


def check_vocabulary(model_vocab: int, tokenizer: Tokenizer, *, own: bool = True, key: str = "models.base") -> None:
    """Refuse a tokenizer that is another model's.

    Or one whose special tokens lie outside the model. Many a model's own tokenizer has ids beyond its rows, which no text
    contains, or far fewer than rows. See `check_ids`.

    Args:
        model_vocab: V, the rows of the unembedding.
        tokenizer: what makes the ids.
        own: it lies beside the model, so that it is the model's whatever the numbers are.
        key: the config section that a message blames.

    Raises:
        ConfigError: the tokenizer is not this model's.
    """
    if not own and model_vocab - tokenizer.vocab_size > _MOST_PADDING:
        raise ConfigError(
            f"{key}: the model has a vocabulary of {model_vocab}, the tokenizer one of only {tokenizer.vocab_size}: it is not "
            "this model's tokenizer"
        )
    ends = {"ends": tokenizer.eos_id, "begins": tokenizer.bos_id}
    for what, token_id in ends.items():
        if token_id is not None and token_id >= model_vocab:
            raise ConfigError(
                f"{key}: the model has a vocabulary of {model_vocab}, the tokenizer one of {tokenizer.vocab_size}, and it "
                f"{what} a text with token {token_id} ({tokenizer.token(token_id)!r}), which would be outside the model; use "
                "the model's own tokenizer"
            )


def check_ids(rows: Mapping[str, int], tokenizer: Tokenizer, datasets: Iterable[TokenDataset | None]) -> None:
    """Refuse data with an id that a model has no row for.

    Args:
        rows: V of each model that reads the data, by what messages call it.
        tokenizer: what made the ids. The data are looked through only where it can make such a one.
        datasets: the tokenized data; those that are None are not there.

    Raises:
        ConfigError: a document has such an id; the message names it.
    """
    name = min(rows, key=lambda name: rows[name])
    if tokenizer.vocab_size <= rows[name]:
        return
    for dataset in datasets:
        if dataset is not None and (found := dataset.first_from(rows[name])) is not None:
            document, token_id = found
            raise ConfigError(
                f"datasets.{document.source}: {document.id} has token {token_id} ({tokenizer.token(token_id)!r}), and {name} "
                f"has a vocabulary of {rows[name]}; leave that out of the text, or use a tokenizer without it"
            )


def check_reading(own: Tokenizer, chosen: Tokenizer) -> None:
    """Refuse a config's tokenizer that changes the meaning of most ids.

    The two may differ in some: reserved tokens get names, rules change. Names of tokens are internal to a tokenizer, and a
    tokenizer without a decoder writes texts of its own, so an id differs only if both do: its text and its name.

    Args:
        own: the tokenizer that lies beside the base model.
        chosen: that of ``[tokenizer]``.

    Raises:
        ConfigError: more than half of the ids mean something else.
    """
    if own.fingerprint() == chosen.fingerprint():
        return
    count = min(own.vocab_size, chosen.vocab_size)
    pairs = {i: (_meaning(own, i), _meaning(chosen, i)) for i in range(0, count, 1 + (count - 1) // _SAMPLE)}
    texts = {i: pair for i, pair in pairs.items() if all(pair) and "\ufffd" not in pair[0] + pair[1]}  # nor pieces of letters
    differ = {i: pair for i, pair in texts.items() if pair[0] != pair[1] and _name(own, i) != _name(chosen, i)}
    if 2 * len(differ) > len(texts):
        token, (learned, read) = next(iter(differ.items()))
        raise ConfigError(
            f"tokenizer: it is not the base model's: of {len(texts)} ids compared {len(differ)} mean something else (token "
            f"{token} is {read!r} in place of {learned!r}); remove [tokenizer] to use the one beside the model"
        )


def _meaning(tokenizer: Tokenizer, token_id: int) -> str:
    try:
        return tokenizer.decode([token_id]).strip()
    except (IndexError, KeyError, ValueError):  # a gap in its vocabulary
        return ""


def _name(tokenizer: Tokenizer, token_id: int) -> str | None:
    try:
        return tokenizer.token(token_id)
    except (IndexError, KeyError, ValueError):
        return None


def compare_tokenizers(first: Tokenizer, second: Tokenizer, *, key: str = "models.ref") -> None:
    """Refuse two models whose tokenizers give some id another meaning.

    Args:
        first: that of the base model.
        second: that of the other model.
        key: the config section of the other model.

    Raises:
        ConfigError: they differ; the message names the first id that they read differently.
    """
    if first.fingerprint() == second.fingerprint():
        return
    if first.vocab_size != second.vocab_size:
        raise ConfigError(
            f"{key}: its tokenizer has {second.vocab_size} tokens, that of the base model {first.vocab_size}; a model with the "
            "base model's vocabulary is needed"
        )
    for token_id in range(first.vocab_size):
        if first.token(token_id) != second.token(token_id):
            raise ConfigError(
                f"{key}: its tokenizer differs from the base model's: token {token_id} is {second.token(token_id)!r} in place "
                f"of {first.token(token_id)!r}; a model with the base model's vocabulary is needed"
            )
    if first.eos_id != second.eos_id:
        raise ConfigError(
            f"{key}: its tokenizer ends a text with token {second.eos_id}, that of the base model with {first.eos_id}"
        )

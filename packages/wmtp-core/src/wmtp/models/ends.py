"""Tokens that begin and end a text.

One fact, which a model folder states in three files.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from wmtp.tokenizers.chat_template import turn_end_id

if TYPE_CHECKING:
    from wmtp.tokenizers import Tokenizer

__all__ = ["end_ids", "learn_ends", "learn_turn_end"]

_log = logging.getLogger("wmtp")


def end_ids(base: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """List the tokens at which a text ends.

    The tokenizer's comes first, then the others of the generation config.
    """
    return _with(_listed(getattr(base.generation_config, "eos_token_id", None)), tokenizer.eos_id)


def learn_ends(base: PreTrainedModel, tokenizer: Tokenizer, where: str) -> None:
    """Set begin and end tokens of a model's configs as in training.

    Readers take the end of a text from the generation config (transformers, vLLM), from ``config.json`` (older programs) or
    from the tokenizer. A list keeps its further ends: a chat model has several.

    Args:
        base: its config and its generation config are changed; a log line says what was.
        tokenizer: ends every document with its end token, and begins it with its begin token, if it has one.
        where: what messages call the model.
    """
    text = base.config.get_text_config(decoder=True)
    places: list[Any] = [base.config, *([] if text is base.config else [text]), base.generation_config]
    changed = []
    for place in places:
        if place is None or not hasattr(place, "eos_token_id"):
            continue
        own = place.eos_token_id
        if tokenizer.eos_id not in _listed(own):
            place.eos_token_id = _with(own, tokenizer.eos_id) if isinstance(own, list) else tokenizer.eos_id
            changed += [own] if own is not None and own not in changed else []
        if tokenizer.bos_id is not None:
            place.bos_token_id = tokenizer.bos_id
    if changed:
        _log.info(
            "%s: ends a text with token %s; training ends it with %d (%s), and so will the saved model",
            where, " or ".join(map(str, changed)), tokenizer.eos_id, tokenizer.token(tokenizer.eos_id),
        )  # fmt: skip


def learn_turn_end(base: PreTrainedModel, tokenizer: Tokenizer, where: str) -> None:
    """Have a chat model stop where its template ends an answer.

    Args:
        base: its generation config gets the token besides its other ends; a log line says so.
        tokenizer: with the template.
        where: what messages call the model.
    """
    generation, end = base.generation_config, turn_end_id(tokenizer)
    if end is None or generation is None or end in end_ids(base, tokenizer):
        return
    generation.eos_token_id = [*end_ids(base, tokenizer), end]  # type: ignore[assignment]
    _log.info(
        "%s: its chat template ends an answer with token %d (%s); the saved model stops there too",
        where,
        end,
        tokenizer.token(end),
    )


def _listed(ends: int | Collection[int] | None) -> list[int]:
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _with(ends: Collection[int], first: int) -> list[int]:
    return [first, *(end for end in ends if end != first)]

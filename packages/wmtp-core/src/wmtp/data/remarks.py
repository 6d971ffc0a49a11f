"""Log lines about a prepared data set.

They say what was found in it, and what of it is not learned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from wmtp.data.dataset import TokenDataset
from wmtp.data.store import TokenStore
from wmtp.tokenizers.base import Tokenizer

__all__ = ["remarks", "template_remark"]

#: tokens of a store that are looked through for special ones
_LOOKED_AT: Final = 1 << 16


def remarks(store: TokenStore, dataset: TokenDataset, max_length: int) -> Iterator[tuple[int, str]]:
    """Yield the log lines about a source, each with its level.

    Args:
        store: the source.
        dataset: the same alone, cut to rows.
        max_length: of a row.
    """
    documents = len(store) + store.info.bad
    for note in store.info.notes:
        yield logging.INFO if note.level == "info" else logging.WARNING, note.of(documents)
    if (said := _cut_off(dataset, max_length)) is not None:
        yield logging.WARNING, said


def template_remark(stores: Mapping[str, TokenStore], tokenizer: Tokenizer) -> str | None:
    """Name the sources that do not use the model's chat template.

    A source uses it where WMTP applies it, or where its texts hold the template's tokens. None where each does.

    Args:
        stores: the sources by name.
        tokenizer: made the tokens.
    """
    if tokenizer.chat_template is None:
        return None
    encoded = [tokenizer.encode(token) for token in tokenizer.control_tokens if token]
    special = sorted({ids[0] for ids in encoded if len(ids) == 1} - {tokenizer.eos_id, tokenizer.bos_id})
    plain = [
        name
        for name, store in stores.items()
        if not store.info.conversations and not np.isin(store.tokens[:_LOOKED_AT], special).any()
    ]
    if not plain:
        return None
    them = f"{', '.join(plain)} {'is' if len(plain) == 1 else 'are'}"
    return (
        f"the model has a chat template, and {them} learned as plain text without it; a data set with "
        'type = "chat" is written by it'
    )


def _cut_off(dataset: TokenDataset, max_length: int) -> str | None:
    """Report the tokens to learn that truncation cuts off, if any."""
    counts = dataset.counts
    if not len(counts.shortened):
        return None
    of = f"{len(counts.shortened):,} of {counts.documents:,} documents (the first: {dataset.place(int(counts.shortened[0]))})"
    text = f"data.train.max_length = {max_length} cuts off {counts.lost:,} tokens that would be learned, of {of}"
    if len(counts.cut_off):
        first = dataset.place(int(counts.cut_off[0]))
        text += f"; of {len(counts.cut_off):,} (the first: {first}) all of them, and these are left out"
    return f"{text}; raise max_length, or see data.train.overlong"

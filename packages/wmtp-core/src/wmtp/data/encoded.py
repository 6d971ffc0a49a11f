"""Texts that are encoded together, before the documents that they belong to are made."""

from __future__ import annotations

from collections.abc import Sequence

from wmtp.tokenizers.base import Tokenizer

__all__ = ["Encoded"]


class Encoded:
    """Encodes many texts at once, and any other when it is asked for.

    Args:
        tokenizer: makes the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._wanted: tuple[dict[str, None], dict[str, None], dict[str, None]] = ({}, {}, {})
        self._first: dict[str, Sequence[int]] = {}
        self._next: dict[str, Sequence[int]] = {}
        self._offsets: dict[str, tuple[list[int], list[tuple[int, int]]] | None] = {}

    def want(self, *, first: str = "", following: str = "", offsets: str = "") -> None:
        """Note texts for `encode`: the first of a document, one behind it, one of which places are wanted too."""
        for texts, text in zip(self._wanted, (first, following, offsets), strict=True):
            if text:
                texts[text] = None

    def encode(self) -> None:
        """Encode all that was noted.

        Raises:
            UnicodeEncodeError: some text is no Unicode; each is encoded when it is asked for then.
        """
        first, following, offsets = (list(texts) for texts in self._wanted)
        if first:
            self._first = dict(zip(first, self._tokenizer.encode_many(first, first=True), strict=True))
        if following:
            self._next = dict(zip(following, self._tokenizer.encode_many(following), strict=True))
        if offsets:
            self._offsets = dict(zip(offsets, self._tokenizer.encode_many_with_offsets(offsets), strict=True))

    def first(self, text: str) -> Sequence[int]:
        """Encode the start of a document."""
        known = self._first.get(text)
        return self._tokenizer.encode_first(text) if known is None else known

    def following(self, text: str) -> Sequence[int]:
        """Encode what stands behind other text."""
        known = self._next.get(text)
        return self._tokenizer.encode(text) if known is None else known

    def with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Encode the start of a document, with the places of its tokens; None: the tokenizer cannot tell them."""
        known = self._offsets.get(text)
        return self._tokenizer.encode_with_offsets(text) if known is None else known

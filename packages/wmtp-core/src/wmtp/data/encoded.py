"""Texts to encode together, before their documents are made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

from wmtp.errors import PluginError
from wmtp.tokenizers.base import Tokenizer
from wmtp.tokenizers.processes import Encoder

__all__ = ["Encoded"]

_Tokens = TypeVar("_Tokens")


class Encoded:
    """Encodes noted texts at once, and any other on demand.

    Args:
        tokenizer: makes the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # None: wanted, and not encoded yet
        self._first: dict[str, Sequence[int] | None] = {}
        self._next: dict[str, Sequence[int] | None] = {}
        self._offsets: dict[str, tuple[Sequence[int], Collection[Sequence[int]]] | None] = {}

    @property
    def characters(self) -> int:
        """Count the characters of all that was noted."""
        return sum(len(text) for noted in (self._first, self._next, self._offsets) for text in noted)

    def want_first(self, text: str) -> None:
        """Note the first text of a document for `encode`."""
        self._first[text] = None

    def want_following(self, text: str) -> None:
        """Note a text that stands behind another."""
        self._next[text] = None

    def want_offsets(self, text: str) -> None:
        """Note a text whose token offsets are wanted too."""
        self._offsets[text] = None

    def encode(self, encoder: Encoder) -> None:
        """Encode all that was noted.

        Args:
            encoder: the tokenizer, or a process that does the same.

        Raises:
            UnicodeEncodeError: some text is no Unicode; each is encoded when it is asked for then.
            PluginError: the tokenizer gave the tokens of more or fewer texts.
        """
        if first := list(self._first):
            self._first = self._by_text(first, encoder.encode_many(first, first=True))
        if following := list(self._next):
            self._next = self._by_text(following, encoder.encode_many(following))
        if offsets := list(self._offsets):
            self._offsets = self._by_text(offsets, encoder.encode_many_with_offsets(offsets))

    def _by_text(self, texts: Sequence[str], answer: Sequence[_Tokens]) -> dict[str, _Tokens]:
        if len(answer) != len(texts):
            name = f"{type(self._tokenizer).__module__}.{type(self._tokenizer).__qualname__}"
            raise PluginError(f"the tokenizer {name} gave the tokens of {len(answer)} texts for {len(texts)}")
        return dict(zip(texts, answer, strict=True))

    def first(self, text: str) -> Sequence[int]:
        """Encode the start of a document."""
        known = self._first.get(text)
        return self._tokenizer.encode_first(text) if known is None else known

    def following(self, text: str) -> Sequence[int]:
        """Encode what stands behind other text."""
        known = self._next.get(text)
        return self._tokenizer.encode(text) if known is None else known

    def with_offsets(self, text: str) -> tuple[Sequence[int], Collection[Sequence[int]]] | None:
        """Encode the start of a document, with its tokens' offsets.

        None: the tokenizer cannot tell them.
        """
        known = self._offsets.get(text)
        return self._tokenizer.encode_with_offsets(text) if known is None else known

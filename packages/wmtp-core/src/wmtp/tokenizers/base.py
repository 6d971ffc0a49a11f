"""Contract of a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from wmtp.plugins.contract import Contract

__all__ = ["Tokenizer"]


class Tokenizer(Contract, ABC, contract=True):
    """Conversion of text to token ids and back.

    Building or using a tokenizer never changes its vocabulary. Padding needs no token: padded places are masked everywhere, and
    filled with ``eos_id``.
    """

    #: how a conversation is written: a Jinja template, or several by name; None: there is none. Saved with the tokenizer
    chat_template: str | Mapping[str, str] | None = None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` can give."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """End-of-sequence token, learned at the end of every document."""

    @property
    def bos_id(self) -> int | None:
        """Token put before every document; None if the vocabulary has none."""
        return None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encode ``text``, with no special token added."""

    def encode_first(self, text: str) -> list[int]:
        """Encode the start of a document.

        As `encode`, with the space that the tokenizer itself puts there.
        """
        return self.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Encode as `encode_first`, with each token's start and end in ``text``.

        None, the default: the tokenizer cannot tell. Then the parts of a conversation that are learned and those that are not
        are always encoded apart.
        """
        return None

    def encode_many(self, texts: Sequence[str], *, first: bool = False) -> Sequence[Sequence[int]]:
        """Encode many texts, as `encode` or as `encode_first`.

        Override it where that is faster, or uses several cores.
        """
        encode = self.encode_first if first else self.encode
        return [encode(text) for text in texts]

    def encode_many_with_offsets(self, texts: Sequence[str]) -> Sequence[tuple[list[int], list[tuple[int, int]]] | None]:
        """Encode many texts as `encode_with_offsets` does."""
        return [self.encode_with_offsets(text) for text in texts]

    def backend_specs(self) -> Sequence[str] | None:
        """Describe the tokenizer as JSON of the package ``tokenizers``.

        Processes that encode many texts read it. One text, or two: for `encode_first` and for `encode`. None, the default: it
        encodes in this process only.
        """
        return None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens by name, as texts; for chat templates.

        The names are ``bos_token``, ``eos_token`` ….
        """
        return {}

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts of the special tokens that begin or end a turn."""
        return frozenset(self.special_tokens.values())

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decode ``ids`` to text; special tokens leave nothing."""

    @abstractmethod
    def token(self, token_id: int) -> str:
        """Return the vocabulary's own string for one id.

        It serves to compare two vocabularies token by token.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash everything that decides `encode`.

        Two tokenizers with equal hashes give equal ids.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a model folder."""

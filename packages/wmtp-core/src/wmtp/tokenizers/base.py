"""The contract of a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from wmtp.plugins.contract import Contract

__all__ = ["Tokenizer"]


class Tokenizer(Contract, ABC, contract=True):
    """Text to token ids and back. Building or using one never changes the vocabulary.

    Padding needs no token: padded places are masked everywhere, and filled with ``eos_id``.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` can give."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The end-of-sequence token, learned at the end of every document."""

    @property
    def bos_id(self) -> int | None:
        """The token put before every document; None if the vocabulary has none."""
        return None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, with no special token added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens leave nothing."""

    @abstractmethod
    def token(self, token_id: int) -> str:
        """The vocabulary's own string for one id, to compare two vocabularies token by token."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that decides `encode`; two tokenizers with equal ones give equal ids."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a model folder."""

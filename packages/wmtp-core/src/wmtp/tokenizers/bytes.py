"""Tokenizer without a vocabulary file: a token is a UTF-8 byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from wmtp.tokenizers.base import Tokenizer
from wmtp.tokenizers.saved import write_saved, write_template

__all__ = ["BytesTokenizer"]

EOS_ID: Final = 256
BOS_ID: Final = 257


class BytesTokenizer(Tokenizer):
    """Byte tokenizer.

    Ids 0..255 are UTF-8 bytes, 256 ends and 257 begins a sequence.
    """

    @property
    def vocab_size(self) -> int:
        """Number of bytes and special tokens: 258."""
        return 258

    @property
    def eos_id(self) -> int:
        """End-of-sequence token: 256."""
        return EOS_ID

    @property
    def bos_id(self) -> int:
        """Begin token: 257."""
        return BOS_ID

    def encode(self, text: str) -> list[int]:
        """Encode ``text`` as its UTF-8 bytes."""
        return list(text.encode("utf-8"))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`; the bytes of a character all stand where it stands."""
        places = [(place, place + 1) for place, character in enumerate(text) for _ in character.encode("utf-8")]
        return list(text.encode("utf-8")), places

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the bytes; invalid UTF-8 becomes U+FFFD, and special tokens leave nothing."""
        return bytes(i for i in ids if i < EOS_ID).decode("utf-8", errors="replace")

    def token(self, token_id: int) -> str:
        """Return the name of a token.

        That is a printable ASCII character itself, ``<0x0A>`` for any other byte, ``<eos>`` or ``<bos>``.
        """
        if token_id in (EOS_ID, BOS_ID):
            return "<eos>" if token_id == EOS_ID else "<bos>"
        if not 0 <= token_id < EOS_ID:
            raise IndexError(f"token id {token_id} is outside 0..{BOS_ID}")
        return chr(token_id) if 0x20 < token_id < 0x7F else f"<0x{token_id:02X}>"

    def fingerprint(self) -> str:
        """Always the same: there is nothing to choose."""
        return f"bytes-eos{EOS_ID}-bos{BOS_ID}"

    def save(self, folder: Path) -> None:
        """Write the small file by which `wmtp.tokenizers.load.load_tokenizer` knows it again."""
        write_saved(folder, "bytes")
        write_template(folder, self.chat_template)

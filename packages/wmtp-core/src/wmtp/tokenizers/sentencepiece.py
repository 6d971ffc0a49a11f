"""SentencePiece models, opened by the package of that name."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import sentencepiece

from wmtp.errors import ConfigError, FileError
from wmtp.tokenizers.base import Tokenizer
from wmtp.tokenizers.saved import write_saved, write_template

__all__ = ["MODEL_NAME", "SentencePieceTokenizer"]

MODEL_NAME: Final = "tokenizer.model"

# SentencePiece puts a space before every text and may drop double spaces, so that two texts encoded apart do not decode to
# their concatenation. A model is a serialized protobuf message, in which a field that comes again overrides: this is
# normalizer_spec (field 3) with add_dummy_prefix (3) and remove_extra_whitespaces (4) false.
_EXACT_SPACES: Final = b"\x1a\x04\x18\x00\x20\x00"
_SPACE_BEFORE: Final = b"\x1a\x04\x18\x01\x20\x00"
_PROBE: Final = "a\n\tb  c"
_log = logging.getLogger("wmtp")


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece model whose `encode` adds no space before a text.

    ``encode(a) + encode(b)`` decodes to ``a + b``. Where a document begins, `encode_first` adds the space that the model itself
    would.

    Args:
        path: a ``.model`` file, or a folder with ``tokenizer.model``.
        eos_token: the end-of-sequence piece instead of the model's own.

    Raises:
        WMTPError: there is no such file, or it is no SentencePiece model.
        ConfigError: there is no end-of-sequence piece.
    """

    def __init__(self, path: Path, *, eos_token: str | None = None) -> None:
        file = path / MODEL_NAME if path.is_dir() else path
        try:
            self._model = file.read_bytes()
        except OSError as error:
            raise FileError(f"{file}: no SentencePiece model can be read there ({error.strerror})") from error
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            if not self._model or not self._processor.LoadFromSerializedProto(self._model + _EXACT_SPACES):
                raise RuntimeError("empty")
        except RuntimeError as error:
            raise FileError(f"{file}: not a SentencePiece model, or damaged") from error
        own = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self._first = self._processor
        if own.encode("a") != self._processor.encode("a"):
            self._first = sentencepiece.SentencePieceProcessor(model_proto=self._model + _SPACE_BEFORE)
        self._eos_token = eos_token
        self._eos_id = self._find_eos(file)
        if self.decode(self.encode(_PROBE)) != _PROBE:
            _log.warning("%s: this SentencePiece model changes line breaks, tabs or spaces; code comes back changed", file)

    def _find_eos(self, file: Path) -> int:
        if self._eos_token is None:
            if self._processor.eos_id() < 0:
                raise ConfigError(f"tokenizer.eos_token: {file} has no end-of-sequence piece; name a piece of its vocabulary")
            return self._processor.eos_id()
        found = self._processor.piece_to_id(self._eos_token)
        if self._processor.id_to_piece(found) != self._eos_token:
            raise ConfigError(f"tokenizer.eos_token: '{self._eos_token}' is not in the vocabulary of {file}")
        return found

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.get_piece_size()

    @property
    def eos_id(self) -> int:
        """End piece of the model, or ``eos_token``."""
        return self._eos_id

    @property
    def bos_id(self) -> int | None:
        """Begin piece of the model, if it has one."""
        found = self._processor.bos_id()
        return None if found < 0 else found

    def encode(self, text: str) -> list[int]:
        """Encode ``text``; no space is put before it, and none is dropped."""
        return self._processor.encode(text)

    def encode_first(self, text: str) -> list[int]:
        """Encode ``text`` behind the space that the model puts there."""
        return self._first.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ``ids``; begin and end leave nothing, and a leading space stays."""
        return self._processor.decode([int(i) for i in ids if i != self._eos_id])

    def token(self, token_id: int) -> str:
        """Return the piece, with ``▁`` for a space."""
        return self._processor.id_to_piece(token_id)

    def fingerprint(self) -> str:
        """A hash of the model file."""
        return hashlib.sha256(b"sentencepiece-exact-spaces-after-the-first\0" + self._model).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.model``, as it was read, into a model folder.

        A file beside it names the tokenizer, for `wmtp.tokenizers.load.load_tokenizer`.
        """
        write_saved(folder, "hf-sentencepiece", eos_token=self._eos_token)
        write_template(folder, self.chat_template)
        (folder / MODEL_NAME).write_bytes(self._model)

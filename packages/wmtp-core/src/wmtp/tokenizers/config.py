"""Config classes of the built-in tokenizers. Torch-free."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from wmtp.errors import ConfigError
from wmtp.plugins.contract import TokenizerConfig
from wmtp.tokenizers.base import Tokenizer

__all__ = ["Bytes", "HfSentencePiece", "HfTransformers", "OwnTokenizer"]


@frozen(kw_only=True)
class OwnTokenizer(TokenizerConfig):
    """Tokenizer of a model, with single keys changed.

    Needs no ``type``.

    Args:
        uri: a model's folder or ``.gguf`` file. Default: the base model's.
        eos_token: the end-of-sequence token, where its files name none or another; must be in the vocabulary.
    """

    type = "own"
    uri: str | None = None
    eos_token: str | None = None

    def build(self, path: Path | None) -> Tokenizer:
        """Open the tokenizer at ``path``.

        That is the local place of ``uri``, or of the base model.
        """
        if path is None:
            raise ConfigError("tokenizer.type: required: a model from scratch brings no tokenizer; write type = 'bytes', say")
        from wmtp.tokenizers.load import load_tokenizer

        return load_tokenizer(path, eos_token=self.eos_token)


@frozen(kw_only=True)
class Bytes(TokenizerConfig):
    """Byte tokenizer: a token is a byte of UTF-8.

    Besides the 256 bytes there are an end (256) and a begin (257). Needs no file.
    """

    type = "bytes"

    def build(self, path: Path | None) -> Tokenizer:
        """Make the tokenizer; ``path`` is not read."""
        from wmtp.tokenizers.bytes import BytesTokenizer

        return BytesTokenizer()


@frozen(kw_only=True)
class HfTransformers(TokenizerConfig):
    """Tokenizer that transformers opens.

    Its vocabulary is never changed: no pad token is added, nothing is resized.

    Args:
        uri: a folder with ``tokenizer.json`` or the like, or a ``.gguf`` file. Default: the base model's.
        gguf_file: the name of the ``.gguf`` file where ``uri`` is a folder that holds it.
        eos_token: the end-of-sequence token, where the tokenizer names none or another; must be in the vocabulary.
    """

    type = "hf-transformers"
    uri: str | None = None
    gguf_file: str | None = None
    eos_token: str | None = None

    def build(self, path: Path | None) -> Tokenizer:
        """Open the tokenizer at ``path``.

        That is the local place of ``uri``, or of the base model.
        """
        if path is None:
            raise ConfigError("tokenizer.uri: is not set, and the base model has no files; say where the tokenizer is")
        from wmtp.tokenizers.hf import HfTokenizer

        return HfTokenizer(path, gguf_file=self.gguf_file, eos_token=self.eos_token)


@frozen(kw_only=True)
class HfSentencePiece(TokenizerConfig):
    """A SentencePiece model, opened by the ``sentencepiece`` package.

    Args:
        uri: a ``.model`` file, or a folder with ``tokenizer.model``. Default: the base model's folder.
        eos_token: the end-of-sequence piece, where the model names none or another; must be in the vocabulary.
    """

    type = "hf-sentencepiece"
    uri: str | None = None
    eos_token: str | None = None

    def build(self, path: Path | None) -> Tokenizer:
        """Open the model at ``path``.

        That is the local place of ``uri``, or of the base model.
        """
        if path is None:
            raise ConfigError("tokenizer.uri: is not set, and the base model has no files; say where the tokenizer is")
        from wmtp.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(path, eos_token=self.eos_token)

"""Text to token ids and back."""

from wmtp.tokenizers.base import Tokenizer

__all__ = ["Tokenizer"]

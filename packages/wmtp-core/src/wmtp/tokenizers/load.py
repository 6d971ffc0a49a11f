"""Opens the tokenizer of a model folder again."""

from __future__ import annotations

from pathlib import Path

from wmtp.errors import ConfigError, FileError
from wmtp.storage.walk import not_there, special_kind
from wmtp.tokenizers.base import Tokenizer
from wmtp.tokenizers.config import Bytes, HfSentencePiece, HfTransformers
from wmtp.tokenizers.saved import read_saved, read_template

__all__ = ["load_tokenizer"]


def load_tokenizer(path: Path, *, eos_token: str | None = None) -> Tokenizer:
    """Open a model's tokenizer.

    That is the one that WMTP saved, else the one of its files.

    Args:
        path: a model folder, a ``.gguf`` file, or a SentencePiece ``.model`` file.
        eos_token: the end-of-sequence token, where its files name none or another.

    Raises:
        WMTPError: there is none, or it is damaged, or was made by another plugin's tokenizer.
        ConfigError: it has no end-of-sequence token.
    """
    if not path.exists() or special_kind(path):
        raise FileError(not_there(path))
    found = _load(path, eos_token)
    if found.chat_template is None and path.is_dir():
        found.chat_template = read_template(path)
    return found


def _load(path: Path, eos_token: str | None) -> Tokenizer:
    saved = read_saved(path) if path.is_dir() else None
    if saved is not None:
        match saved["type"]:
            case Bytes.type:
                if eos_token is not None:
                    raise ConfigError(f"tokenizer.eos_token: has no effect: {path} is read as bytes, which have their own end")
                return Bytes().build(path)
            case HfTransformers.type:
                return HfTransformers(eos_token=eos_token).build(path)
            case HfSentencePiece.type:
                return HfSentencePiece(eos_token=eos_token or saved.get("eos_token")).build(path)
            case other:
                raise FileError(f"{path}: its tokenizer is a '{other}', which only the config that names it can open")
    if path.suffix == ".model" or (path.is_dir() and _only_sentencepiece(path)):
        return HfSentencePiece(eos_token=eos_token).build(path)
    return HfTransformers(eos_token=eos_token).build(path)


def _only_sentencepiece(folder: Path) -> bool:
    from wmtp.tokenizers.hf import HF_FILES

    return (folder / "tokenizer.model").is_file() and not any((folder / name).is_file() for name in HF_FILES)

"""Tokenizers that transformers opens."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from wmtp.errors import ConfigError, FileError, WMTPError, described
from wmtp.log_lines import transformers_quiet
from wmtp.tokenizers.base import Tokenizer
from wmtp.tokenizers.saved import write_saved

__all__ = ["HF_FILES", "HfTokenizer", "open_auto_tokenizer"]

#: a folder with one of these has a tokenizer for transformers
HF_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


class HfTokenizer(Tokenizer):
    """Tokenizer of transformers, used as it is.

    No token is added, no remote code runs, nothing is downloaded.

    `encode` adds no space before a text, also where the tokenizer itself would: ``encode(a) + encode(b)`` decodes to ``a + b``.
    `encode_first`, for the beginning of a document, gives the ids that transformers gives.

    Args:
        path: a folder, or a ``.gguf`` file.
        gguf_file: the ``.gguf`` file in the folder ``path``.
        eos_token: the end-of-sequence token instead of the tokenizer's own.

    Raises:
        WMTPError: transformers finds no tokenizer there, or cannot open it.
        ConfigError: there is no end-of-sequence token.
    """

    def __init__(self, path: Path, *, gguf_file: str | None = None, eos_token: str | None = None) -> None:
        self._tokenizer = open_auto_tokenizer(path, gguf_file)
        self._vocab: dict[str, int] = self._tokenizer.get_vocab()
        self._eos_id = self._find_eos(path, eos_token)
        spec = json.loads(_backend(self._tokenizer, path).to_str())
        # a post-processor adds special tokens, which is done elsewhere, and makes offsets leave out spaces
        spec["truncation"] = spec["padding"] = spec["post_processor"] = None
        following = _without_added_space(spec)
        self._spec, own = (json.dumps(each, sort_keys=True) for each in (following, spec))
        self._backend = self._first = Backend.from_str(self._spec)
        if following | {"decoder": None} != spec | {"decoder": None}:
            self._first = Backend.from_str(own)
        if own != self._spec:
            self._spec += own
        self.chat_template = self._tokenizer.chat_template
        begin = self._tokenizer.bos_token_id
        added = self._tokenizer("a")["input_ids"]
        self._bos_id = begin if isinstance(begin, int) and added[:1] == [begin] else None

    def _find_eos(self, path: Path, eos_token: str | None) -> int:
        if eos_token is not None:
            if eos_token not in self._vocab:
                raise ConfigError(f"tokenizer.eos_token: '{eos_token}' is not in the vocabulary of {path}")
            self._tokenizer.eos_token = eos_token
        found = self._tokenizer.eos_token
        if found is None:
            raise ConfigError(f"tokenizer.eos_token: {path} names no end-of-sequence token; name one of its vocabulary")
        if found not in self._vocab:
            raise ConfigError(f"tokenizer.eos_token: '{found}', which {path} names, is not in its vocabulary; name one that is")
        return self._vocab[str(found)]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._vocab.values()) + 1

    @property
    def eos_id(self) -> int:
        """End-of-sequence token: the tokenizer's own, or ``eos_token``."""
        return self._eos_id

    @property
    def bos_id(self) -> int | None:
        """Begin token, where the tokenizer puts one before a text by itself.

        Else None, even if a token has that name.
        """
        return self._bos_id

    def encode(self, text: str) -> list[int]:
        """Encode ``text``.

        Text that spells a special token, for instance of a chat template, becomes that token.
        """
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_first(self, text: str) -> list[int]:
        """Encode as transformers does, without special tokens.

        The space that the tokenizer puts before a text is there.
        """
        return self._first.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode_first`, with the places of the tokens."""
        encoded = self._first.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def encode_many(self, texts: Sequence[str], *, first: bool = False) -> list[list[int]]:
        """Encode many texts, on all cores."""
        backend = self._first if first else self._backend
        return [encoded.ids for encoded in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_many_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Encode many texts with the places of their tokens, on all cores."""
        return [(encoded.ids, encoded.offsets) for encoded in self._first.encode_batch(list(texts), add_special_tokens=False)]

    def backend_specs(self) -> Sequence[str] | None:
        """Describe the tokenizer to other processes.

        None for a subclass, which may do more.
        """
        if type(self) is not HfTokenizer:
            return None
        backends = (self._first,) if self._first is self._backend else (self._first, self._backend)
        return [backend.to_str() for backend in backends]

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens that transformers gives to a chat template."""
        return {name: token for name, token in self._tokenizer.special_tokens_map.items() if isinstance(token, str)}

    @property
    def control_tokens(self) -> frozenset[str]:
        """All added tokens of the vocabulary that are special."""
        return frozenset(str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ``ids`` to text; special tokens leave nothing."""
        return self._backend.decode([int(i) for i in ids if i not in (self._eos_id, self._bos_id)], skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """Return the vocabulary's own string for one id."""
        found = self._backend.id_to_token(token_id)
        if found is None:
            raise IndexError(f"token id {token_id} is not in the vocabulary")
        return found

    def fingerprint(self) -> str:
        """A hash of vocabulary, merges and rules."""
        return hashlib.sha256(self._spec.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write what ``AutoTokenizer.from_pretrained(folder)`` opens, as it was read except for ``eos_token``."""
        write_saved(folder, "hf-transformers")
        self._tokenizer.chat_template = self.chat_template
        self._tokenizer.save_pretrained(str(folder))


def open_auto_tokenizer(path: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Open a tokenizer by ``AutoTokenizer``, without network and without foreign code.

    Raises:
        WMTPError: there is no tokenizer, or it is damaged.
    """
    if path.is_file() and path.suffix == ".gguf":
        path, gguf_file = path.parent, path.name
    if not path.is_dir():
        raise FileError(f"{path}: {'not a folder or .gguf file' if path.exists() else 'no such folder or .gguf file'}")
    if gguf_file is None and not any((path / name).is_file() for name in HF_FILES):
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) != 1:
            reason = f"several .gguf files ({', '.join(found)}); set gguf_file" if found else f"none of {', '.join(HF_FILES)}"
            raise FileError(f"{path}: holds no tokenizer that transformers can open: {reason}")
        gguf_file = found[0]
    if gguf_file is not None and not (path / gguf_file).is_file():
        raise FileError(f"{path / gguf_file}: no such file")
    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        with transformers_quiet():  # it remarks on a model's type that it does not know
            opened = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False, **options)
        return opened if gguf_file is None else _with_end_token_of(path / gguf_file, _own_tokens_only(opened, path))
    except WMTPError:
        raise
    except ImportError as error:
        extra = "gguf" if gguf_file else "train"
        raise FileError(
            f"{path}: its tokenizer needs a package that is missing ({error}); pip install wmtp-core[{extra}]"
        ) from error
    except Exception as error:  # transformers and tokenizers raise many types for a damaged file
        raise FileError(f"{path / (gguf_file or '')}: transformers cannot open this tokenizer ({described(error)})") from error


def _backend(tokenizer: PreTrainedTokenizerBase, path: Path) -> Backend:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise FileError(
            f"{path}: {type(tokenizer).__name__} works without the tokenizers package, which is not supported;"
            " convert it to tokenizer.json, or use type = 'hf-sentencepiece'"
        )
    return backend


def _with_end_token_of(file: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Set the end-of-sequence token that a GGUF file names.

    transformers 5.17 takes the begin token for both.

    Raises:
        WMTPError: there is no such token.
    """
    if tokenizer.eos_token_id not in (None, tokenizer.bos_token_id):
        return tokenizer  # reading a large vocabulary again takes seconds
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get("tokenizer.ggml.eos_token_id")
    if field is not None:
        number = int(field.contents())
        if not 0 <= number < len(tokenizer):
            raise FileError(f"{file}: tokenizer.ggml.eos_token_id is {number}, and there are {len(tokenizer)} tokens")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(number)
    return tokenizer


def _own_tokens_only(tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedTokenizerBase:
    """Remove the tokens that transformers adds to those of a GGUF file.

    The model has no embedding for them.
    """
    spec = json.loads(_backend(tokenizer, path).to_str())
    own = {entry if isinstance(entry, str) else entry[0] for entry in spec["model"]["vocab"]}  # Unigram: [piece, score]
    kept = [token for token in spec["added_tokens"] if token["content"] in own]
    if len(kept) == len(spec["added_tokens"]):
        return tokenizer
    spec["added_tokens"] = kept
    names = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str) and token in own}
    backend = Backend.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **names)


def _without_added_space(spec: dict[str, Any]) -> dict[str, Any]:
    """Remove rules that add or strip a leading space.

    ``spec`` is the content of a ``tokenizer.json``.
    """
    spec = copy.deepcopy(spec)
    spec["normalizer"] = _dropped(spec.get("normalizer"), "normalizers", lambda rule: rule["type"] == "Prepend")
    spec["decoder"] = _dropped(
        spec.get("decoder"),
        "decoders",
        lambda rule: rule["type"] == "Strip" and rule.get("content") == " " and rule.get("start"),
    )
    for part in ("pre_tokenizer", "decoder"):
        rule = spec.get(part)
        for inner in [] if rule is None else (rule.get("pretokenizers") or rule.get("decoders") or [rule]):
            if inner["type"] == "Metaspace":
                inner["prepend_scheme"] = "never"
                inner.pop("add_prefix_space", None)
            elif inner["type"] == "ByteLevel":
                inner["add_prefix_space"] = False
    return spec


def _dropped(rule: dict[str, Any] | None, inner: str, drop: Any) -> dict[str, Any] | None:
    if rule is None or drop(rule):
        return None
    if rule["type"] == "Sequence":
        kept = [part for part in rule[inner] if not drop(part)]
        return {**rule, inner: kept}
    return rule

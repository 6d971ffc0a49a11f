"""Suggest the name that was meant."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Final

__all__ = ["did_you_mean", "is_text", "nearest", "odd_character"]

#: words of other tools for what has another name here, or one of several: a hint only where that name is among the known ones
_SYNONYMS: Final = {
    "gpu": "cuda",
    "apple": "mps",
    "float32": "fp32",
    "bfloat16": "bf16",
    "train": "run",
    "sft": "run baseline-mtp",
    "rho": "rho1-wmtp",
    "rho-1": "rho1-wmtp",
    "critic": "critic-wmtp",
    "medusa": "residual",
    "gguf": "hf",
    "huggingface": "hf",
    "transformers": "hf",
    "safetensors": "hf",
    "json": "jsonl",
    "csv": "jsonl",
    "tsv": "jsonl",
    "parquet": "jsonl",
    "arrow": "jsonl",
    "completion": "jsonl",
    "alpaca": "chat",
    "sharegpt": "chat",
    "messages": "chat",
    "conversational": "chat",
    "tb": "tensorboard",
    "none": "jsonl constant",
    "finetune": "run",
    "fine-tune": "run",
    "evaluate": "eval",
    "test": "eval",
    "infer": "generate",
    "inference": "generate",
    "chat": "generate",
    "validate": "check",
    "new": "init",
    "create": "init",
    "download": "fetch",
    "upload": "push",
    "convert": "export",
    "merge": "export",
    "submit": "launch",
    "stop": "cancel",
    "list": "plugins",
    "weights-and-biases": "wandb",
}


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Find the known name most like ``name``; None without one.

    Args:
        name: as it was written.
        known: what it can be.
        cutoff: the least similarity, as `difflib.SequenceMatcher.ratio` measures it.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def odd_character(text: str) -> str:
    """Write a hint at the first non-ASCII character, or nothing.

    As ``; 'а' is CYRILLIC SMALL LETTER A``: no keyword has one. A word copied from a web page may hold a letter, a quote or a
    space that only looks like the one that is meant.
    """
    found = next((character for character in text if not character.isascii()), None)
    return "" if found is None else f"; {found!r} is {unicodedata.name(found, f'U+{ord(found):04X}')}"


def is_text(given: str) -> bool:
    """Tell whether a text holds no lone surrogates, which stand for bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in given)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Write ``did you mean 'NAME'?``; None without a similar name.

    A known name is meant that is like it, or says the same.
    """
    names = list(known)
    words = ((word, here) for word, others in _SYNONYMS.items() for here in others.split())
    meant = {word: here for word, here in words if here in names and word not in names}
    close = meant.get(name.lower()) or nearest(name, [*names, *meant]) or nearest(name.lower(), [*names, *meant])
    return None if close is None else f"did you mean '{meant.get(close, close)}'?"

"""Validation of a tokenizer before a corpus is encoded."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

from wmtp.errors import PluginError
from wmtp.tokenizers.base import Tokenizer

__all__ = ["check_tokenizer"]

_PROBE: Final = "def f(x):\n    return x + 1\n"


def check_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Encode a short text, and validate the ids.

    A tokenizer that cannot encode this text passes.

    Args:
        tokenizer: as it was built.
        name: what messages call it.

    Raises:
        PluginError: its ids are no whole numbers, or outside of its vocabulary, or it gives too few lists of them, or no text.
    """
    many = _result(lambda: tokenizer.encode_many([_PROBE, _PROBE]))
    if many is not None and len(many) != 2:
        raise PluginError(f"{name}: encode_many gave {len(many)} lists of ids for 2 texts")
    for method, found in (
        ("encode", _result(lambda: [tokenizer.encode(_PROBE)])),
        ("encode_first", _result(lambda: [tokenizer.encode_first(_PROBE)])),
        ("encode_many", many),
        ("eos_id", [[tokenizer.eos_id]]),
        ("bos_id", None if tokenizer.bos_id is None else [[tokenizer.bos_id]]),
    ):
        for ids in found or ():
            _check_ids(ids, tokenizer.vocab_size, f"{name}: {method}")
    decoded = _result(lambda: [tokenizer.decode([tokenizer.eos_id])])
    for method, texts in (("fingerprint", [tokenizer.fingerprint()]), ("decode", decoded)):
        for text in texts or ():
            if not isinstance(text, str):
                raise PluginError(f"{name}: {method} returned {text!r:.60}, not a text")


def _result(method: Callable[[], Any]) -> Any:
    """Return what a method gives; None if it fails.

    A small alphabet may lack the text's characters.
    """
    try:
        return method()
    except Exception:
        return None


def _check_ids(ids: Any, vocab_size: int, title: str) -> None:
    try:
        numbers = [operator.index(number) for number in ids]
    except TypeError:
        raise PluginError(f"{title} gave {ids!r:.60}, not a list of whole numbers") from None
    if outside := [number for number in numbers if not 0 <= number < vocab_size]:
        raise PluginError(f"{title} gave the id {outside[0]}, outside of its vocabulary, 0..{vocab_size - 1}")

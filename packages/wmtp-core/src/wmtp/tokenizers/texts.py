"""Text of each single token of a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from wmtp.tokenizers.base import Tokenizer

__all__ = ["token_texts"]

#: what undecodable bytes become
_REPLACEMENT: Final = "\ufffd"
#: bytes of the longest character in UTF-8: no more tokens than that wait for the end of one
_LONGEST_CHARACTER: Final = 4


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to the text before it.

    Joined they are the decoded text, except that a token without any text (end-of-sequence) is shown by its name in the
    vocabulary. A character made of several tokens belongs to its last one; the others add nothing.
    """
    texts: list[str] = []
    # Each token is decoded behind the one before it: at the start of a text many tokenizers drop a space.
    start = shown = 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:shown])
        now = tokenizer.decode(ids[start:end])
        if now.endswith(_REPLACEMENT) and end - shown < _LONGEST_CHARACTER and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :] or tokenizer.token(ids[end - 1]))
        start, shown = shown, end
    return texts

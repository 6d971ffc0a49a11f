"""Tokens of a whole document, in segments that are learned alike.

Of many millions of documents each has these objects: one that is frozen takes three times as long to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attrs import define, field

__all__ = ["CONTEXT", "LEARNED", "NEVER", "Segment", "TokenizedExample"]

#: kinds of segments: never learned (a begin token, a message with ``train = false``), context (a prompt), to be learned
NEVER: Final = 0
CONTEXT: Final = 1
LEARNED: Final = 2


@define
class Segment:
    """Tokens that follow each other and are learned alike.

    Args:
        length: their number.
        kind: `NEVER`, `CONTEXT` or `LEARNED`.
        scale: multiplies the weights that a trainer gives them.
    """

    length: int
    kind: int
    scale: float = 1.0


@define(kw_only=True)
class TokenizedExample:
    """A whole document.

    Args:
        tokens: all of them, begin and end tokens included.
        segments: what they are; their lengths add up to the number of tokens.
        weights: the data's own weight of each token; None: 1 each.
        conversation: whether a chat template made it.
    """

    tokens: Sequence[int]
    segments: Sequence[Segment]
    weights: Sequence[float] | None = None
    conversation: bool = field(default=False)

    @property
    def prompt_length(self) -> int:
        """Count the tokens before the last run to learn.

        All of them, where there is none.
        """
        found, end, before = None, 0, CONTEXT
        for segment in self.segments:
            if segment.kind == LEARNED != before:
                found = end
            end, before = end + segment.length, segment.kind
        return end if found is None else found

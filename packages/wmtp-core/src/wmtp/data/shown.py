"""Documents as a run will learn them, for people to read.

They show tokens, mask and weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Final

import numpy as np
from attrs import frozen

from wmtp.data.dataset import TokenDataset
from wmtp.tokenizers.base import Tokenizer
from wmtp.tokenizers.texts import token_texts

__all__ = ["LEGEND", "ShownDocument", "ShownToken", "shown_documents"]

LEGEND: Final = (
    "learned: ⟦…⟧, green on a terminal; │ ends a token; ×n multiplies the trainer's weight; w n is the data's own weight, for "
    "trainers that read it"
)
#: documents that are shown, and of each the tokens, those next to a border of what is learned first
_DOCUMENTS: Final = 4
_TOKENS: Final = 240
_NEAR: Final = 16
_INDENT: Final = "    "
_PLAIN: Final = ("⟦", "⟧")
#: green letters for what is learned, faint ones for the rest
_COLOURS: Final = {True: "\x1b[32m", False: "\x1b[2m"}
_END_COLOUR: Final = "\x1b[0m"


@frozen
class ShownToken:
    """A token of a document.

    Args:
        text: what it adds to the text; a special token by its name.
        learned: whether head 1 learns it.
        scale: multiplies the weight that a trainer gives it.
        weight: the data's own weight of it.
    """

    text: str
    learned: bool
    scale: float = 1.0
    weight: float = 1.0


@frozen(kw_only=True)
class ShownDocument:
    """A document, or the piece of it that fits a row.

    ``str()`` of it marks what is learned.

    Args:
        source: what the config calls its data set.
        id: its name in there.
        tokens: all of them.
    """

    source: str
    id: str
    tokens: Sequence[ShownToken]

    def __str__(self) -> str:
        return self.text()

    def text(self, *, colour: bool = False) -> str:
        """Write the document with its tokens and what is learned of it.

        Args:
            colour: by escape sequences of a terminal in place of marks.
        """
        learned = sum(token.learned for token in self.tokens)
        title = f"{self.source}: {_visible(self.id)}, {len(self.tokens):,} tokens, {learned:,} of them learned"
        lines = [""]
        for kind, tokens in groupby(self._chosen(), key=_kind):
            if kind is None:
                lines[-1] += f" … {sum(1 for _ in tokens):,} more … "
                continue
            for line in _lines([token.text for token in tokens if token is not None]):
                lines[-1] += _marked(line, *kind, colour=colour)
                if line[-1].endswith("\n"):
                    lines.append("")
        return "\n".join([title, *(_INDENT + line for line in lines if line)])

    def _chosen(self) -> Iterator[ShownToken | None]:
        """Yield the tokens to show, and None for each other."""
        kinds = [_kind(token) for token in self.tokens]
        count = len(kinds)
        borders = [0, *(place for place in range(1, count) if kinds[place] != kinds[place - 1]), count]
        near = dict.fromkeys(
            place for border in borders for place in range(border - _NEAR, border + _NEAR) if 0 <= place < count
        )
        chosen = set(range(count) if count <= _TOKENS else islice(near, _TOKENS))
        for place, token in enumerate(self.tokens):
            yield token if place in chosen else None


def shown_documents(dataset: TokenDataset, tokenizer: Tokenizer) -> list[ShownDocument]:
    """Choose some documents of a data set to show.

    The first of each source; of a single source the first two.

    Args:
        dataset: the training data.
        tokenizer: made the tokens.
    """
    sources = dataset.sources
    each = 2 if len(np.unique(sources)) == 1 else 1
    found = [np.flatnonzero(sources == source)[:each] for source in np.unique(sources)]
    return [_shown(dataset, tokenizer, int(number)) for number in np.concatenate(found)[:_DOCUMENTS]]


def _shown(dataset: TokenDataset, tokenizer: Tokenizer, number: int) -> ShownDocument:
    piece = dataset.document(number)
    learned = piece.loss_mask.copy()
    learned[:1] = False  # nothing before it could predict it
    ones = np.ones(len(learned), np.float32)
    columns = (
        token_texts(tokenizer, piece.tokens.tolist()),
        learned.tolist(),
        (ones if piece.scale is None else piece.scale).tolist(),
        (ones if piece.weight is None else piece.weight).tolist(),
    )
    tokens = tuple(ShownToken(*values) for values in zip(*columns, strict=True))
    return ShownDocument(source=piece.document.source, id=piece.document.id, tokens=tokens)


def _kind(token: ShownToken | None) -> tuple[bool, float, float] | None:
    """Return what tokens under one mark have in common."""
    if token is None:
        return None
    return (True, token.scale, token.weight) if token.learned else (False, 1.0, 1.0)


def _lines(texts: Sequence[str]) -> Iterator[list[str]]:
    """Divide tokens behind each that ends a line."""
    line: list[str] = []
    for text in texts:
        line.append(text)
        if text.endswith("\n"):
            yield line
            line = []
    if line:
        yield line


def _marked(texts: Sequence[str], learned: bool, scale: float, weight: float, *, colour: bool) -> str:
    label = (f"×{scale:g} " if scale != 1 else "") + (f"w{weight:g} " if weight != 1 else "")
    text = label + "".join(f"{_visible(text)}│" for text in texts)
    if colour:
        return f"{_COLOURS[learned]}{text}{_END_COLOUR}"
    return text.join(_PLAIN) if learned else text


def _visible(text: str) -> str:
    """Escape control characters as Python does.

    A document must not command the terminal.
    """
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)

"""Rendering of examples to tokens.

It is the only place that decides which tokens are learned.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from attrs import define, field

from wmtp.data.base import BadExample, Example, Span
from wmtp.data.conversation import Learn, Part, conversation_text
from wmtp.data.encoded import Encoded
from wmtp.data.notes import Note, Notes
from wmtp.data.parts import text_parts, token_weights, weighted_spans
from wmtp.data.tokenized import LEARNED, NEVER, Segment, TokenizedExample
from wmtp.tokenizers.base import Tokenizer
from wmtp.tokenizers.chat_template import ChatTemplate

__all__ = ["Boundary", "Prepared", "Renderer"]

Boundary = Literal["apart", "together"]

#: characters on either side of a border that decide whether a token reaches over it
_NEAR: Final = 16
#: so many documents are looked at for tokens that would reach over a border: each border is encoded twice
_LOOKED_AT: Final = 2_000


@define
class Prepared:
    """An example whose texts are to be encoded.

    Args:
        example: where it is from.
        parts: texts that are learned alike.
        spans: what they were made of, where these have weights of their tokens.
        apart: whether each is encoded on its own.
        borders: texts around each border between what is learned and what is not, with the place of the border.
        notes: remarks on it.
    """

    example: Example
    parts: Sequence[Part]
    spans: Sequence[Span] | None
    apart: bool = field(kw_only=True)
    borders: Sequence[tuple[str, int]] = field(default=(), kw_only=True)
    notes: Sequence[Note] = field(default=(), kw_only=True)


class Renderer:
    """Makes the tokens of documents.

    Args:
        tokenizer: what makes the tokens.
        learn: parts of conversations to learn.
        boundary: whether a token may reach from what is not learned to what is.
    """

    def __init__(self, tokenizer: Tokenizer, *, learn: Learn = "assistant", boundary: Boundary = "apart") -> None:
        self.notes = Notes()
        #: examples of the data set so far, bad ones included
        self.seen = 0
        self.tokenizer = tokenizer
        self._eos_id, self._bos_id = tokenizer.eos_id, tokenizer.bos_id
        self._learn: Learn = learn
        self._boundary = boundary
        self._template = None
        if tokenizer.chat_template is not None:
            self._template = ChatTemplate(source=tokenizer.chat_template, special_tokens=tokenizer.special_tokens)
        self._control_tokens = tokenizer.control_tokens

    def __call__(self, example: Example) -> TokenizedExample:
        """Make the tokens of an example, and mark those that are learned.

        Raises:
            BadExample: it cannot be learned from; the message says why.
            ConfigError: the chat template and ``learn`` do not fit.
        """
        encoded = Encoded(self.tokenizer)
        return self.finished(self.prepared(example, encoded), encoded)

    def prepared(self, example: Example, encoded: Encoded) -> Prepared:
        """Divide an example into texts, and note those that it needs encoded.

        Raises:
            BadExample: see `__call__`.
            ConfigError: see `__call__`.
        """
        try:
            return self._conversation(example, encoded) if example.messages is not None else self._text(example, encoded)
        except UnicodeEncodeError as error:
            raise _no_unicode(example, error) from error

    def finished(self, prepared: Prepared, encoded: Encoded) -> TokenizedExample:
        """Make the tokens of a prepared example.

        Raises:
            BadExample: see `__call__`.
        """
        example = prepared.example
        try:
            if example.messages is not None:
                found = self._finished_conversation(prepared, encoded)
            else:
                found = self._finished_text(prepared, encoded)
        except UnicodeEncodeError as error:
            raise _no_unicode(example, error) from error
        for key in example.unread:
            unread = "text is under {}, which no key of the data set names: it is not read" + example.unread_hint
            level = "warning" if example.unread_hint else "info"
            self.notes.add(unread, example.place, level=level, subject=f'"{key}"')
        return found

    def _conversation(self, example: Example, encoded: Encoded) -> Prepared:
        if self._template is None:
            raise BadExample(example.place, "is a conversation, and the tokenizer has no chat template")
        notes = Notes()  # others are prepared before this one is finished
        parts = conversation_text(example, self._template, self._learn, self._control_tokens, notes)
        encoded.want_offsets("".join(part.text for part in parts))
        return Prepared(example, parts, None, apart=False, notes=notes.list())

    def _text(self, example: Example, encoded: Encoded) -> Prepared:
        spans, parts = weighted_spans(example), text_parts(example)
        if self._boundary == "together" and spans is None:
            encoded.want_offsets("".join(part.text for part in parts))
            return Prepared(example, parts, spans, apart=False)
        want = encoded.want_first
        for part in parts:
            if part.text:
                want(part.text)
                want = encoded.want_following
        borders = list(_borders(parts)) if self.seen <= _LOOKED_AT else []
        for text, _ in borders:
            encoded.want_offsets(text)
        return Prepared(example, parts, spans, apart=True, borders=borders)

    def _finished_conversation(self, prepared: Prepared, encoded: Encoded) -> TokenizedExample:
        parts, example = prepared.parts, prepared.example
        for note in prepared.notes:
            self.notes.add(note.text, note.first, level=note.level)
        tokens, counts = self._encode(parts, example, encoded)
        begin = int(bool(tokens) and tokens[0] == self._bos_id)
        return TokenizedExample(tokens=tokens, segments=_segments(parts, counts, begin), conversation=True)

    def _finished_text(self, prepared: Prepared, encoded: Encoded) -> TokenizedExample:
        parts, example = prepared.parts, prepared.example
        if prepared.apart:
            tokens, counts = _apart(parts, encoded)
            self._count_merges(prepared, encoded)
        else:
            tokens, counts = self._encode(parts, example, encoded)
        weights, end_weight = (None, 1.0) if prepared.spans is None else token_weights(prepared.spans, counts, example)
        eos, bos = self._eos_id, self._bos_id
        if self._ends(tokens):
            self._note_own("end", eos, example)
        elif not example.is_cut:
            tokens.append(eos)
            counts[-1] += 1
        if weights is not None:
            weights = [*weights, end_weight][: len(tokens)]
        if bos is not None and tokens and tokens[0] == bos:
            self._note_own("begin", bos, example)
        elif bos is not None:
            tokens.insert(0, bos)
            counts[0] += 1
            weights = None if weights is None else [1.0, *weights]
        return TokenizedExample(tokens=tokens, segments=_segments(parts, counts, int(bos is not None)), weights=weights)

    def _ends(self, tokens: Sequence[int]) -> bool:
        """Tell whether a text ends with an end token.

        A token of white space may follow it.
        """
        eos = self._eos_id
        if not tokens or tokens[-1] == eos:
            return bool(tokens)
        return len(tokens) > 1 and tokens[-2] == eos and self.tokenizer.decode(tokens[-1:]).isspace()

    def _encode(self, parts: Sequence[Part], example: Example, encoded: Encoded) -> tuple[array[int], list[int]]:
        """Encode the texts as one, unless tokens cross a forbidden border.

        Of the texts that a token reaches into, the first that is learned has it.
        """
        texts = [part.text for part in parts]
        found = encoded.with_offsets("".join(texts))
        if found is None:
            return _apart(parts, encoded)
        tokens, offsets = found
        ends = np.cumsum([len(text) for text in texts])
        starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
        owners = np.searchsorted(ends, starts, side="right")
        last = np.maximum(np.searchsorted(ends, stops, side="left"), owners)
        crossing = np.flatnonzero(last > owners)
        if len(crossing):
            self._note_merge(example)
            if self._boundary == "apart":
                return _apart(parts, encoded)
        for token in crossing:
            reached = range(owners[token], last[token] + 1)
            learned = (part for part in reached if texts[part] and parts[part].kind == LEARNED)
            owners[token] = next(learned, owners[token])
        return array("I", tokens), np.bincount(np.minimum(owners, len(texts) - 1), minlength=len(texts)).tolist()

    def _count_merges(self, prepared: Prepared, encoded: Encoded) -> None:
        """Note an example with a token that would cross a border.

        It would if the example were encoded as a whole.
        """
        for text, border in prepared.borders:
            found = encoded.with_offsets(text)
            if found is not None and any(start < border < stop for start, stop in found[1]):
                self._note_merge(prepared.example, among=_LOOKED_AT)
                return

    def _note_merge(self, example: Example, among: int | None = None) -> None:
        merged = "a token reaches from what is not learned to what is, and is learned"
        apart = (
            "encoded as a whole, they would have a token that reaches from what is not learned to what is; these parts are "
            "encoded apart (data.train.boundary = 'together' learns that token)"
        )
        self.notes.add(apart if self._boundary == "apart" else merged, example.place, level="info", among=among)

    def _note_own(self, which: Literal["begin", "end"], token: int, example: Example) -> None:
        text = f"the text brings its own {which} token, {self.tokenizer.token(token)!r}; no second one is added"
        self.notes.add(text, example.place, level="warning" if which == "begin" else "info")


def _apart(parts: Sequence[Part], encoded: Encoded) -> tuple[array[int], list[int]]:
    """Encode each text on its own.

    Returns all tokens, and how many each text has.
    """
    tokens = array("I")
    counts: list[int] = []
    for part in parts:
        before = len(tokens)
        if part.text:
            tokens.extend(encoded.following(part.text) if tokens else encoded.first(part.text))
        counts.append(len(tokens) - before)
    return tokens, counts


def _borders(parts: Sequence[Part]) -> Iterator[tuple[str, int]]:
    """Yield the text around each border of what is learned.

    With it comes the place of the border in it.
    """
    for before, after in pairwise(parts):
        if before.kind != after.kind and before.text and after.text:
            left = before.text[-_NEAR:]
            yield left + after.text[:_NEAR], len(left)


def _no_unicode(example: Example, error: UnicodeEncodeError) -> BadExample:
    return BadExample(example.place, f"holds text that is not valid Unicode ({error.reason})")


def _segments(parts: Sequence[Part], counts: Sequence[int], begin: int) -> list[Segment]:
    """Join tokens that are learned alike into segments.

    The first ``begin`` tokens are never learned.
    """
    found = [Segment(begin, NEVER)] if begin else []
    for part, count in zip(parts, counts, strict=True):
        length = count - begin if begin < count else 0
        begin -= count - length
        if not length:
            continue
        if found and (found[-1].kind, found[-1].scale) == (part.kind, part.scale):
            found[-1] = Segment(found[-1].length + length, part.kind, part.scale)
        else:
            found.append(Segment(length, part.kind, part.scale))
    return found

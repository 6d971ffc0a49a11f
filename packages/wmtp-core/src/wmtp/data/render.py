"""From examples to tokens: the only place that decides which tokens are learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from wmtp.data.base import BadExample, Example, Span
from wmtp.data.conversation import Learn, Part, conversation_text
from wmtp.data.notes import Notes
from wmtp.data.tokenized import CONTEXT, LEARNED, NEVER, Segment, TokenizedExample
from wmtp.tokenizers.base import Tokenizer
from wmtp.tokenizers.chat_template import ChatTemplate

__all__ = ["Boundary", "Renderer"]

Boundary = Literal["apart", "together"]

#: characters on either side of a border that decide whether a token reaches over it
_NEAR: Final = 16


class Renderer:
    """Makes the tokens of documents.

    Args:
        tokenizer: what makes the tokens.
        learn: parts of conversations to learn.
        boundary: whether a token may reach from what is not learned to what is.
    """

    def __init__(self, tokenizer: Tokenizer, *, learn: Learn = "assistant", boundary: Boundary = "apart") -> None:
        self.notes = Notes()
        self._tokenizer = tokenizer
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
        try:
            found = self._conversation(example) if example.messages is not None else self._text(example)
        except UnicodeEncodeError as error:
            raise BadExample(example.place, f"holds text that is no Unicode ({error.reason})") from error
        for key in example.unread:
            unread = "text is under {}, which no key of the data set names: it is not read" + example.unread_hint
            level = "warning" if example.unread_hint else "info"
            self.notes.add(unread, example.place, level=level, subject=f'"{key}"')
        return found

    def _conversation(self, example: Example) -> TokenizedExample:
        if self._template is None:
            raise BadExample(example.place, "is a conversation, and the tokenizer has no chat template")
        parts = conversation_text(example, self._template, self._learn, self._control_tokens, self.notes)
        tokens, counts = self._encode([part.text for part in parts], [part.kind for part in parts], example)
        begin = int(bool(tokens) and tokens[0] == self._tokenizer.bos_id)
        return TokenizedExample(tokens=tokens, segments=_segments(parts, counts, begin), conversation=True)

    def _text(self, example: Example) -> TokenizedExample:
        spans = example_spans(example)
        parts = [
            Part(span.text, NEVER if not span.weight else LEARNED if span.learn else CONTEXT, span.weight or 1.0)
            for span in spans
        ]
        texts, kinds = [part.text for part in parts], [part.kind for part in parts]
        if self._boundary == "apart" or any(span.token_weights is not None for span in spans):
            tokens, counts = self._apart(texts)
            self._count_merges(texts, kinds, example)
        else:
            tokens, counts = self._encode(texts, kinds, example)
        weights, end_weight = _token_weights(spans, counts, example)
        eos, bos = self._tokenizer.eos_id, self._tokenizer.bos_id
        if self._ends(tokens):
            self._note_own("end", eos, example)
        else:
            tokens.append(eos)
            counts[-1] += 1
        if weights is not None:
            weights = [*weights, end_weight][: len(tokens)]
        if bos is not None and tokens[0] == bos:
            self._note_own("begin", bos, example)
        elif bos is not None:
            tokens.insert(0, bos)
            counts[0] += 1
            weights = None if weights is None else [1.0, *weights]
        return TokenizedExample(tokens=tokens, segments=_segments(parts, counts, int(bos is not None)), weights=weights)

    def _ends(self, tokens: Sequence[int]) -> bool:
        """Tell whether a text ends with an end token, or with one and a token of white space."""
        eos = self._tokenizer.eos_id
        if not tokens or tokens[-1] == eos:
            return bool(tokens)
        return len(tokens) > 1 and tokens[-2] == eos and self._tokenizer.decode(tokens[-1:]).isspace()

    def _apart(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Encode texts each on its own: all their tokens, and how many each has."""
        tokens: list[int] = []
        counts: list[int] = []
        for text in texts:
            before = len(tokens)
            if text:
                tokens += self._tokenizer.encode(text) if tokens else self._tokenizer.encode_first(text)
            counts.append(len(tokens) - before)
        return tokens, counts

    def _encode(self, texts: Sequence[str], kinds: Sequence[int], example: Example) -> tuple[list[int], list[int]]:
        """Encode the texts as one, unless a token would cross a forbidden border.

        Of the texts that a token reaches into, the first that is learned has it.
        """
        found = self._tokenizer.encode_with_offsets("".join(texts))
        if found is None:
            return self._apart(texts)
        tokens, offsets = found
        ends = np.cumsum([len(text) for text in texts])
        starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
        owners = np.searchsorted(ends, starts, side="right")
        last = np.maximum(np.searchsorted(ends, stops, side="left"), owners)
        crossing = np.flatnonzero(last > owners)
        if len(crossing):
            self._note_merge(example)
            if self._boundary == "apart":
                return self._apart(texts)
        for token in crossing:
            reached = range(owners[token], last[token] + 1)
            owners[token] = next((part for part in reached if texts[part] and kinds[part] == LEARNED), owners[token])
        return tokens, np.bincount(np.minimum(owners, len(texts) - 1), minlength=len(texts)).tolist()

    def _count_merges(self, texts: Sequence[str], kinds: Sequence[int], example: Example) -> None:
        """Note an example of which a token would reach over a border, were it encoded as a whole."""
        for number in range(1, len(texts)):
            left, right = texts[number - 1][-_NEAR:], texts[number][:_NEAR]
            if not left or not right or kinds[number - 1] == kinds[number]:
                continue
            found = self._tokenizer.encode_with_offsets(left + right)
            if found is not None and any(start < len(left) < stop for start, stop in found[1]):
                self._note_merge(example)
                return

    def _note_merge(self, example: Example) -> None:
        merged = "a token reaches from what is not learned to what is, and is learned"
        apart = (
            "encoded as a whole, they would have a token that reaches from what is not learned to what is; these parts are "
            "encoded apart (data.train.boundary = 'together' learns that token)"
        )
        self.notes.add(apart if self._boundary == "apart" else merged, example.place, level="info")

    def _note_own(self, which: Literal["begin", "end"], token: int, example: Example) -> None:
        text = f"the text brings its own {which} token, {self._tokenizer.token(token)!r}; no second one is added"
        self.notes.add(text, example.place, level="warning" if which == "begin" else "info")


def example_spans(example: Example) -> Sequence[Span]:
    """List the spans of an example that is no conversation.

    Raises:
        BadExample: the texts of its weights are not its completion.
    """
    if example.spans is not None:
        return example.spans
    prompt = [Span(example.prompt, learn=False)] if example.prompt else []
    weights = example.weights
    if weights is None:
        return [*prompt, Span(example.completion)]
    if weights and isinstance(weights[0], tuple):
        pairs: Sequence[tuple[str, float]] = weights  # type: ignore[assignment]
        if "".join(text for text, _ in pairs) != example.completion:
            raise BadExample(example.place, "the texts of its weights, joined, are not the completion")
        return [*prompt, *(Span(text, token_weights=float(weight)) for text, weight in pairs)]
    return [*prompt, Span(example.completion, token_weights=tuple(float(weight) for weight in weights))]  # type: ignore[arg-type]


def _token_weights(spans: Sequence[Span], counts: Sequence[int], example: Example) -> tuple[list[float] | None, float]:
    """Collect the data's own weight of each token (or None), and that of an end token without one.

    The last span may have one more than tokens: it is that of the end token.
    """
    found: list[float] = []
    all_given: list[float] = []
    for number, (span, count) in enumerate(zip(spans, counts, strict=True)):
        given = span.token_weights
        values = list(given) if isinstance(given, tuple) else [1.0 if given is None else given] * count
        if wrong := [value for value in values if not 0 <= value < math.inf]:
            raise BadExample(example.place, f"has a weight of {wrong[0]}; weights are finite and ≥ 0")
        if len(values) != count and not (number == len(spans) - 1 and len(values) == count + 1):
            raise BadExample(
                example.place,
                f"has {len(values)} weights, but its completion is {count} tokens with this tokenizer;"
                " give one for each token (and maybe one for the end), or [text, weight] pairs",
            )
        found += values
        if given is not None:
            all_given += values
    if all(span.token_weights is None for span in spans):
        return None, 1.0
    # a document whose weights are all 0 teaches nothing, its end neither
    return found, 0.0 if all_given and not any(all_given) else 1.0


def _segments(parts: Sequence[Part], counts: Sequence[int], begin: int) -> list[Segment]:
    """Runs of tokens that are learned alike; the first ``begin`` tokens never are."""
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

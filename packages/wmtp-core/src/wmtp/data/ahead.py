"""Encoding of many documents at once, while others are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

from wmtp.data.base import BadExample, Example
from wmtp.data.encoded import Encoded
from wmtp.data.render import Prepared, Renderer
from wmtp.data.tokenized import TokenizedExample
from wmtp.tokenizers.processes import Encodings

__all__ = ["tokenized"]

#: characters and documents that are encoded at once: a tokenizer holds some 30 bytes a character meanwhile
_CHARACTERS: Final = 500_000
_DOCUMENTS: Final = 1 << 11
#: assumed of a conversation, which has no text yet
_CONVERSATION: Final = 2_000

Result = tuple[Example, TokenizedExample] | BadExample


def tokenized(
    examples: Iterable[Example | BadExample], renderer: Renderer, *, check: Callable[[Example], None], stop_at_bad: bool
) -> Iterator[Result]:
    """Tokenize examples, in order.

    The next ones are encoded meanwhile, on all cores.

    Args:
        examples: what a loader yields.
        renderer: makes the documents.
        check: raises if what was yielded is no example.
        stop_at_bad: whether nothing is kept once there is a bad example: what follows is looked at for problems only.
    """
    has_bad = False
    with Encodings(renderer.tokenizer) as encodings:
        waiting: deque[tuple[Sequence[Prepared | BadExample], Encoded, Future[None]]] = deque()
        for chunk in _chunks(examples):
            entries: list[Prepared | BadExample] = []
            encoded = Encoded(renderer.tokenizer)
            for example in chunk:
                renderer.seen += 1
                try:
                    if isinstance(example, BadExample):
                        raise example
                    check(example)
                    if stop_at_bad and has_bad and example.weights is None and example.messages is None:
                        continue
                    entries.append(renderer.prepared(example, encoded))
                except BadExample as bad:
                    has_bad = True
                    entries.append(bad)
            waiting.append((entries, encoded, encodings.submit(encoded)))
            while len(waiting) > encodings.ahead:
                yield from _finished(renderer, *waiting.popleft())
        while waiting:
            yield from _finished(renderer, *waiting.popleft())


def _finished(
    renderer: Renderer, entries: Sequence[Prepared | BadExample], encoded: Encoded, encoding: Future[None]
) -> Iterator[Result]:
    # text that is no Unicode: its document is found below, where each is encoded by itself
    with suppress(UnicodeEncodeError):
        encoding.result()
    for entry in entries:
        try:
            if isinstance(entry, BadExample):
                raise entry
            yield entry.example, renderer.finished(entry, encoded)
        except BadExample as bad:
            yield bad


def _chunks(examples: Iterable[Example | BadExample]) -> Iterator[list[Example | BadExample]]:
    chunk: list[Example | BadExample] = []
    characters = 0
    for example in examples:
        chunk.append(example)
        if isinstance(example, Example):
            characters += len(example.prompt) + len(example.completion) or _size(example)
        if characters >= _CHARACTERS or len(chunk) >= _DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _size(example: Example) -> int:
    return sum(len(span.text) for span in example.spans) if example.spans is not None else _CONVERSATION

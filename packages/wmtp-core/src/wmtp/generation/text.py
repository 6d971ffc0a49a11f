"""From text to text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from attrs import evolve

from wmtp.generation.base import Generation, Sampling
from wmtp.generation.decoding import generate
from wmtp.models.ends import end_ids

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = ["StopAt", "TextStream", "encode_prompt", "generate_texts"]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt as in training: after the begin token, where the tokenizer has one and the text does not bring it."""
    ids = tokenizer.encode(text)
    return ids if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def generate_texts(
    model: MTPModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    speculative: bool = False,
    sampling: Sampling | None = None,
    rows: Sequence[int] | None = None,
    stop: Sequence[str] = (),
) -> list[Generation]:
    """As `wmtp.generation.generate`, with texts; ``stop`` are texts before the first of which a completion ends."""
    generations = generate(
        model,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        eos_id=end_ids(model.base, tokenizer),
        speculative=speculative,
        sampling=sampling,
        rows=rows,
        stop=StopAt(tokenizer, stop) if stop else None,
    )
    return [evolve(row, text=cut(tokenizer.decode(row.tokens), stop)) for row in generations]


def cut(text: str, stop: Sequence[str]) -> str:
    """Cut the text before the first of ``stop``."""
    ends = [place for place in (text.find(word) for word in stop) if place >= 0]
    return text[: min(ends)] if ends else text


class StopAt:
    """Stop condition: one of some texts has just been written.

    Args:
        tokenizer: decodes the tokens.
        words: the texts.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._words = tuple(words)
        # a token is at least a byte: so many tokens surely hold the longest word, and the character it may begin inside of
        self._tail = max(len(word.encode()) for word in words) + 4

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Return True if ``tokens`` hold one of the words near their end."""
        text = self._tokenizer.decode(tokens[-self._tail :])
        return any(word in text for word in self._words)


class TextStream:
    """Turns tokens that come piece by piece into text that comes piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def pieces(self, steps: Iterator[list[int]]) -> Iterator[str]:
        """Yield the text of each step, once no later token can change it."""
        for tokens in steps:
            self._tokens += tokens
            text = self._tokenizer.decode(self._tokens)
            # the last character may be the beginning of one that takes several tokens
            whole = text.rstrip("\ufffd")
            if whole.startswith(self._shown) and len(whole) > len(self._shown):
                yield whole[len(self._shown) :]
                self._shown = whole
        text = self._tokenizer.decode(self._tokens)
        if text[len(self._shown) :]:
            yield text[len(self._shown) :]

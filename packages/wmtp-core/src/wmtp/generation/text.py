"""From text to text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve

from wmtp.data.base import BadExample
from wmtp.data.messages import message_tools, normal_messages
from wmtp.errors import ConfigError
from wmtp.generation.base import Generation, Sampling, check_stop
from wmtp.generation.decoding import generate
from wmtp.models.ends import end_ids
from wmtp.tokenizers.chat_template import ChatTemplate, TemplateFailure, turn_end_id

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = ["StopAt", "TextStream", "chat_ends", "chat_prompt", "encode_prompt", "generate_texts"]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a prompt as in training.

    The begin token comes first, where the tokenizer has one and the text does not bring it.
    """
    ids = tokenizer.encode_first(text) if text else []
    return ids if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def chat_prompt(
    tokenizer: Tokenizer, messages: str | Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Encode a conversation up to where the model answers.

    The chat template does it, as in training.

    Args:
        tokenizer: with the template.
        messages: each with ``role`` and ``content``; a text is what a user says.
        tools: that the model may call.

    Raises:
        ConfigError: there is no template, it refuses the conversation, or an assistant has said the last word.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            "chat: the model's tokenizer has no chat template; continue a plain text instead, or put the template beside the "
            "model as chat_template.jinja"
        )
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    try:
        found, known = normal_messages("chat", "messages", messages), message_tools("chat", "tools", tools)
    except BadExample as problem:
        raise ConfigError(str(problem)) from problem
    if found[-1]["role"] == "assistant":
        raise ConfigError("chat: the last message is an assistant's; end with one of a user or a tool, for the model to answer")
    template = ChatTemplate(source=tokenizer.chat_template, special_tokens=tokenizer.special_tokens)
    try:
        return tokenizer.encode_first(template.render(found, known, prompt=True))
    except TemplateFailure as failure:
        raise ConfigError(f"chat: the chat template refuses the messages ({failure})") from failure


def chat_ends(model: MTPModel, tokenizer: Tokenizer) -> list[int]:
    """List the tokens at which an answer ends.

    They are those of any text, and the one that the chat template writes behind it.
    """
    ends, turn = end_ids(model.base, tokenizer), turn_end_id(tokenizer)
    return ends if turn is None or turn in ends else [*ends, turn]


def generate_texts(
    model: MTPModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    speculative: bool | int = False,
    sampling: Sampling | None = None,
    rows: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    ends: Collection[int] | None = None,
) -> list[Generation]:
    """As `wmtp.generation.generate`, with texts.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        prompts: texts, or their ids.
        max_new_tokens: the most tokens that are added to a prompt.
        speculative: whether heads 2..H draft; a number: so many of the first of them.
        sampling: default greedy.
        rows: a number for each prompt, which its draws depend on.
        stop: texts before the first of which a completion ends.
        ends: tokens that end a text. Default: those of the tokenizer and of the generation config.
    """
    check_stop(stop)
    generations = generate(
        model,
        [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts],
        max_new_tokens=max_new_tokens,
        eos_id=end_ids(model.base, tokenizer) if ends is None else ends,
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
    """Stream of text from a stream of tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def pieces(self, steps: Iterator[list[int]]) -> Iterator[str]:
        """Yield each step's text once no later token can change it."""
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

"""Continue a text, or answer in a conversation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from wmtp.actions.files import storage_section
from wmtp.config.load import ConfigSource
from wmtp.errors import ConfigError
from wmtp.public import public

if TYPE_CHECKING:
    from wmtp.generation import Sampling
    from wmtp.models.opening import OpenedModel

__all__ = ["Generated", "Writer", "conversation", "generate", "open_writer", "sampling_by"]


@frozen(kw_only=True)
class Generated:
    """Result of `generate`.

    Args:
        prompt: the text before, or the last message.
        text: the text that follows it.
        tokens: ids of ``text``, and of a stop text behind it.
        seconds: of decoding.
        tokens_per_forward: on average; None for a single forward pass.
        speculative: whether heads 2..H drafted.
        seed: of the draws.
    """

    prompt: str
    text: str
    tokens: Sequence[int]
    seconds: float
    tokens_per_forward: float | None
    speculative: bool
    seed: int


@public
def generate(
    model: str | os.PathLike[str],
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    speculative: bool | int = False,
    compiled: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["fp32", "bf16"] | None = None,
    on_text: Callable[[str], None] | None = None,
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Generated:
    """Continue a text, as ``wmtp generate`` does.

    For several texts open the model once: `wmtp.load_model`.

    Args:
        model: as for `wmtp.load_model`.
        prompt: the text to continue; with ``chat`` what a user says, or the messages of a conversation.
        chat: answer by the model's chat template, and end where a turn ends.
        system: with ``chat`` a message before all others.
        max_new_tokens: maximum number of new tokens. Default: 128, with ``chat`` 512.
        temperature: 0 takes the most probable token.
        top_p: of nucleus sampling.
        seed: of the draws.
        stop: texts that end the completion; they are not part of it.
        speculative: let heads 2..H draft: the same text, sooner. A number: only so many of the first of them.
        compiled: compile the model's layers; see `wmtp.generation.compile_model`.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: of the parameters. Default: as saved.
        on_text: called with each piece of the text as it comes; with ``stop`` once, with the whole, because a piece might be
            the beginning of a stop text.
        config: as for `wmtp.load_model`.
        overrides: ``KEY=VALUE`` texts laid over those.

    Raises:
        ConfigError: there is no such model, the prompt is empty or too long, or an argument is wrong.
        WMTPError: files are missing or damaged.
    """
    if not chat and not isinstance(prompt, str):
        raise ConfigError("prompt: messages need chat = True")
    if not chat and system is not None:
        raise ConfigError("system: has no effect without chat = True")
    writer = open_writer(
        model,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        speculative=speculative,
        compiled=compiled,
        device=device,
        precision=precision,
        config=config,
        overrides=overrides,
    )
    if isinstance(prompt, str) and not chat:
        return writer.complete(prompt, on_text)
    return writer.answer(conversation(prompt, system), on_text)


def conversation(said: str | Sequence[Mapping[str, Any]], system: str | None) -> list[Mapping[str, Any]]:
    """Make messages of a user's text, after an optional system message."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, *([{"role": "user", "content": said}] if isinstance(said, str) else said)]


def open_writer(
    model: str | os.PathLike[str],
    *,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    stop: Sequence[str],
    speculative: bool | int,
    compiled: bool,
    device: Literal["auto", "cpu", "cuda", "mps"],
    precision: Literal["fp32", "bf16"] | None,
    config: ConfigSource | Sequence[ConfigSource],
    overrides: Iterable[str],
) -> Writer:
    """Open a model to write with.

    Arguments and errors: see `generate`.
    """
    from wmtp.devices import pick_device
    from wmtp.generation import compile_model
    from wmtp.generation.base import check_stop
    from wmtp.models.opening import open_model

    check_stop(stop)
    sampling = sampling_by(temperature=temperature, top_p=top_p, seed=seed)
    storage = storage_section(config, overrides)
    opened = open_model(model, device=pick_device(device), precision=precision, storage=storage)
    if compiled:
        compile_model(opened.model)
    return Writer(opened, sampling=sampling, stop=stop, speculative=speculative, max_new_tokens=max_new_tokens)


def sampling_by(*, temperature: float, top_p: float, seed: int) -> Sampling:
    """Make a command's choice of the next token; `ConfigError` names its flags."""
    from wmtp.generation import Sampling

    if top_p != 1.0 and temperature == 0.0:
        raise ConfigError("--top-p: has no effect: --temperature 0, the default, is greedy; give a temperature, or remove it")
    try:
        return Sampling(temperature=temperature, top_p=top_p, seed=seed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--temperature, --top-p, --seed: {error.args[0]}") from None


class Writer:
    """An open model that writes texts, piece by piece.

    Args:
        opened: the model.
        sampling: how tokens are chosen.
        stop: texts that end a completion.
        speculative: whether heads 2..H draft; a number: so many of the first of them.
        max_new_tokens: maximum number of new tokens. Default: 128, of an answer 512.
    """

    def __init__(
        self,
        opened: OpenedModel,
        *,
        sampling: Sampling,
        stop: Sequence[str],
        speculative: bool | int,
        max_new_tokens: int | None,
    ) -> None:
        self.opened = opened
        self._sampling, self._stop = sampling, stop
        self._speculative, self._most_new = speculative, max_new_tokens

    def complete(self, prompt: str, on_text: Callable[[str], None] | None = None) -> Generated:
        """Complete a text. Arguments and errors: see `generate`."""
        from wmtp.generation.text import encode_prompt
        from wmtp.models.ends import end_ids

        tokenizer = self.opened.tokenizer
        ends = end_ids(self.opened.model.base, tokenizer)
        most = 128 if self._most_new is None else self._most_new
        return self._write(prompt, encode_prompt(tokenizer, prompt), ends, most, on_text)

    def answer(self, messages: Sequence[Mapping[str, Any]], on_text: Callable[[str], None] | None = None) -> Generated:
        """Answer in a conversation.

        Arguments and errors: see `generate`.
        """
        from wmtp.generation.text import chat_ends, chat_prompt

        tokenizer = self.opened.tokenizer
        ids, ends = chat_prompt(tokenizer, messages), chat_ends(self.opened.model, tokenizer)
        most = 512 if self._most_new is None else self._most_new
        return self._write(str(messages[-1].get("content") or ""), ids, ends, most, on_text)

    def _write(
        self, prompt: str, ids: Sequence[int], ends: Sequence[int], most_new: int, on_text: Callable[[str], None] | None
    ) -> Generated:
        from wmtp.generation import stream
        from wmtp.generation.text import StopAt, TextStream, cut

        tokenizer, stop = self.opened.tokenizer, self._stop
        steps: list[list[int]] = []
        started = time.perf_counter()

        def taken() -> Iterator[list[int]]:
            for step in stream(
                self.opened.model,
                ids,
                max_new_tokens=most_new,
                eos_id=ends,
                speculative=self._speculative,
                sampling=self._sampling,
                stop=StopAt(tokenizer, stop) if stop else None,
            ):
                steps.append(step)
                yield step

        text = ""
        for piece in TextStream(tokenizer).pieces(taken()):
            text += piece
            if on_text is not None and not stop:
                on_text(piece)
        seconds = time.perf_counter() - started
        text = cut(text, stop)
        if on_text is not None and stop:
            on_text(text)
        tokens = [token for step in steps for token in step]
        return Generated(
            prompt=prompt,
            text=text,
            tokens=tokens,
            seconds=seconds,
            tokens_per_forward=(len(tokens) - 1) / (len(steps) - 1) if len(steps) > 1 else None,
            speculative=bool(self._speculative),
            seed=self._sampling.seed,
        )

"""Generate a text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from attrs import frozen

from wmtp.actions.files import storage_section
from wmtp.config.load import ConfigSource
from wmtp.errors import ConfigError

__all__ = ["Generated", "generate"]


@frozen(kw_only=True)
class Generated:
    """Result of `generate`.

    Args:
        prompt: the text before.
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


def generate(
    model: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    speculative: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["fp32", "bf16"] | None = None,
    on_text: Callable[[str], None] | None = None,
    config: Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Generated:
    """Continue a text, as ``wmtp generate`` does. For several texts open the model once: `wmtp.load_model`.

    Args:
        model: as for `wmtp.load_model`.
        prompt: the text to continue.
        max_new_tokens: at most so many.
        temperature: 0 takes the most probable token.
        top_p: of nucleus sampling.
        seed: of the draws.
        stop: texts that end the completion; they are not part of it.
        speculative: let heads 2..H draft: the same text, sooner.
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
    from wmtp.devices import pick_device
    from wmtp.generation import Sampling, stream
    from wmtp.generation.text import StopAt, TextStream, cut, encode_prompt
    from wmtp.models.ends import end_ids
    from wmtp.models.opening import open_model

    if top_p != 1.0 and temperature == 0.0:
        raise ConfigError("--top-p: has no effect: --temperature 0, the default, is greedy; give a temperature, or remove it")
    try:
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    except ValueError as error:
        raise ConfigError(f"--temperature, --top-p, --seed: {error.args[0]}") from None
    storage = storage_section(config, overrides)
    opened = open_model(model, device=pick_device(device), precision=precision, storage=storage)
    steps: list[list[int]] = []
    started = time.perf_counter()

    def taken() -> Iterator[list[int]]:
        for step in stream(
            opened.model,
            encode_prompt(opened.tokenizer, prompt),
            max_new_tokens=max_new_tokens,
            eos_id=end_ids(opened.model.base, opened.tokenizer),
            speculative=speculative,
            sampling=sampling,
            stop=StopAt(opened.tokenizer, stop) if stop else None,
        ):
            steps.append(step)
            yield step

    text = ""
    for piece in TextStream(opened.tokenizer).pieces(taken()):
        text += piece
        if on_text is not None and not stop:
            on_text(piece)
    seconds = time.perf_counter() - started
    text = cut(text, stop)
    if on_text is not None and stop:
        on_text(text)
    tokens = [token for step in steps for token in step]
    per_forward = (len(tokens) - 1) / (len(steps) - 1) if len(steps) > 1 else None
    return Generated(
        prompt=prompt,
        text=text,
        tokens=tokens,
        seconds=seconds,
        tokens_per_forward=per_forward,
        speculative=speculative,
        seed=seed,
    )

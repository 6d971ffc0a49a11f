"""Self-distillation data: a model's own answers to given prompts.

Its heads can be trained on them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from wmtp.actions.files import storage_section
from wmtp.actions.generate import sampling_by
from wmtp.config.load import ConfigSource
from wmtp.config.places import build_backends
from wmtp.errors import ConfigError
from wmtp.public import public
from wmtp.redaction import redact
from wmtp.storage.uris import backend_for, file_path, scheme_of

if TYPE_CHECKING:
    from wmtp.data.prompts import Prompt
    from wmtp.generation import Generation, Sampling
    from wmtp.models.opening import OpenedModel

__all__ = ["Distilled", "distill_data"]

logger = logging.getLogger("wmtp")

_FIRST_LINE = 5.0
_LOG_SECONDS = 30.0


@frozen(kw_only=True)
class Distilled:
    """Result of `distill_data`.

    Args:
        output: where the lines are.
        dataset: the ``type`` of a data set that reads them: ``chat`` or ``jsonl``.
        prompts: their number.
        written: lines that this call added.
        found: lines that were there before.
        too_long: prompts that leave the model no position for an answer.
        unfinished: answers, of those that this call added, that ``max_new_tokens`` or the model's context cut off.
        tokens: that this call made.
        seconds: of it.
    """

    output: str
    dataset: str
    prompts: int
    written: int
    found: int
    too_long: int
    unfinished: int
    tokens: int
    seconds: float


@public
def distill_data(
    model: str | os.PathLike[str],
    prompts: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    template: Literal["auto", "none"] = "auto",
    limit: int | None = None,
    speculative: bool | int = False,
    compiled: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["fp32", "bf16"] | None = None,
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Distilled:
    """Write a model's answers to prompts, as ``wmtp distill-data`` does.

    They are training data. Called again with the same arguments, it continues where it stopped; no prompt is answered twice.

    Args:
        model: as for `wmtp.load_model`.
        prompts: data files or folders, as paths or URIs: records with a ``prompt`` (a text or messages) or ``messages``.
        output: the file of JSON lines, or its URI, to which it is copied at the end.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the most probable token.
        top_p: of nucleus sampling.
        seed: of the draws; an answer depends on it and on the prompt's number only.
        batch_size: prompts that are answered at once.
        template: ``auto`` writes prompts by the model's chat template, where it has one; ``none`` continues their text.
        limit: number of first prompts to use.
        speculative: let heads 2..H draft: the same text, sooner. A number: only so many of the first of them.
        compiled: compile the model's layers; see `wmtp.generation.compile_model`.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: of the parameters. Default: as saved.
        config: as for `wmtp.load_model`.
        overrides: ``KEY=VALUE`` texts laid over those.

    Raises:
        ConfigError: there is no such model or prompt, the model has no end token, or the output is of other arguments.
        WMTPError: something cannot be read or written.
    """
    from wmtp.data.prompts import fingerprint, read_prompts
    from wmtp.data.resumable_lines import ResumableLines
    from wmtp.devices import pick_device
    from wmtp.generation import compile_model
    from wmtp.generation.decoding import count_drafts
    from wmtp.models.opening import open_model
    from wmtp.storage.uris import localize

    sampling = sampling_by(temperature=temperature, top_p=top_p, seed=seed)
    storage = storage_section(config, overrides)
    backends, cache_dir = build_backends(storage), Path(storage.cache_dir).expanduser()
    target = os.fspath(output)
    path = _work_file(target, cache_dir)
    if not path.name.endswith(".jsonl"):
        raise ConfigError(f"--output: {redact(target)}: JSON lines are written; call it something.jsonl")
    remote = scheme_of(target) != "file"
    if remote:
        backend_for(target, backends, key="--output").check_push(target)
    given = [prompts] if isinstance(prompts, str | os.PathLike) else prompts
    read = read_prompts([localize(os.fspath(name), backends, cache_dir) for name in given])[:limit]

    opened = open_model(model, device=pick_device(device), precision=precision, storage=storage)
    if compiled:
        compile_model(opened.model)
    count_drafts(opened.model, speculative)
    teacher = _Teacher(opened, read, use_template=template == "auto" and opened.tokenizer.chat_template is not None)
    settings = {
        "model": redact(opened.name), "prompts": len(read), "of": fingerprint(read), "max_new_tokens": max_new_tokens,
        "temperature": temperature, "top_p": top_p, "seed": seed, "template": teacher.use_template,
    }  # fmt: skip
    lines = ResumableLines(path, settings)
    found, began = len(lines.done), time.monotonic()
    if found:
        logger.info("%s: %d of %d answers are there", path, found, len(read))
    progress = _Progress(lines.done, len(read))
    written = tokens = unfinished = 0
    for batch in teacher.batches(lines.done, batch_size):
        answers = teacher.answer(
            batch, max_new_tokens=max_new_tokens, sampling=sampling, speculative=speculative, on_step=progress.step
        )
        lines.add(teacher.line(index, answer) for index, answer in zip(batch, answers, strict=True))
        written += len(answers)
        tokens += sum(len(answer.tokens) for answer in answers)
        unfinished += sum(answer.finish != "eos" for answer in answers)
    lines.finish()
    if teacher.too_long:
        logger.warning("%d prompts leave the model no position for an answer, and are left out", teacher.too_long)
    if unfinished:
        logger.info("%d of %d answers were cut off before their end token", unfinished, written)
    if remote:
        backend_for(target, backends).push(path, target)
    return Distilled(
        output=redact(target) if remote else str(path),
        dataset="chat" if teacher.use_template else "jsonl",
        prompts=len(read),
        written=written,
        found=found,
        too_long=teacher.too_long,
        unfinished=unfinished,
        tokens=tokens,
        seconds=time.monotonic() - began,
    )


def _work_file(target: str, cache_dir: Path) -> Path:
    """Choose the local file that grows: the target, or a cached one.

    For a URI it is in the cache.
    """
    if scheme_of(target) == "file":
        return file_path(target)
    name = target.rstrip("/").rpartition("/")[2].partition("?")[0]
    return cache_dir / "distilled" / hashlib.sha256(target.encode()).hexdigest()[:16] / name


class _Progress:
    """Lines of progress: after some seconds, then now and again.

    The first comes within the first batch where that takes longer.

    Args:
        done: numbers of the prompts whose answers are written, which grows.
        prompts: how many there are.
    """

    def __init__(self, done: Collection[int], prompts: int) -> None:
        self._done, self._prompts, self._tokens = done, prompts, 0
        self._began = time.monotonic()
        self._next = self._began + _FIRST_LINE

    def step(self, tokens: int) -> None:
        """Count the tokens of one step of decoding."""
        self._tokens += tokens
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LOG_SECONDS
            speed = self._tokens / (now - self._began)
            logger.info("%d of %d answers, %d tokens, %.0f tokens/s", len(self._done), self._prompts, self._tokens, speed)


class _Teacher:
    """A model with the prompts that it answers.

    Args:
        opened: the model.
        prompts: all of them.
        use_template: whether its chat template writes them.
    """

    def __init__(self, opened: OpenedModel, prompts: Sequence[Prompt], *, use_template: bool) -> None:
        from wmtp.generation.text import chat_ends, chat_prompt, encode_prompt
        from wmtp.models.ends import end_ids

        self._opened, self._prompts, self.use_template = opened, prompts, use_template
        model, tokenizer = opened.model, opened.tokenizer
        if use_template:
            self._ends = chat_ends(model, tokenizer)
            self._ids = [self._of(prompt, lambda p: chat_prompt(tokenizer, self._messages(p), p.tools)) for prompt in prompts]
        else:
            self._ends = end_ids(model.base, tokenizer)
            if wrong := next((prompt for prompt in prompts if prompt.text is None), None):
                raise ConfigError(
                    f"{wrong.id}: holds messages, which a chat template writes, and {opened.name} has or uses none; "
                    "give prompts of text, or a model with a template"
                )
            self._ids = [encode_prompt(tokenizer, prompt.text or "") for prompt in prompts]
        longest = opened.model.max_positions or 2**62
        self._fits = [0 < len(ids) < longest for ids in self._ids]
        self.too_long = len(prompts) - sum(self._fits)

    def _of(self, prompt: Prompt, encode: Callable[[Prompt], list[int]]) -> list[int]:
        try:
            return encode(prompt)
        except ConfigError as error:
            raise error.under(prompt.id) from error

    def _messages(self, prompt: Prompt) -> Sequence[Mapping[str, Any]]:
        return prompt.messages or [{"role": "user", "content": prompt.text}]

    def batches(self, done: set[int], size: int) -> Iterator[list[int]]:
        """Yield the indices of prompts to answer, in batches, in order."""
        left = [index for index, fits in enumerate(self._fits) if fits and index not in done]
        for start in range(0, len(left), size):
            yield left[start : start + size]

    def answer(
        self,
        batch: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        speculative: bool | int,
        on_step: Callable[[int], None],
    ) -> list[Generation]:
        """Answer some prompts."""
        from wmtp.generation import generate

        return generate(
            self._opened.model,
            [self._ids[index] for index in batch],
            max_new_tokens=max_new_tokens,
            eos_id=self._ends,
            speculative=speculative,
            sampling=sampling,
            rows=batch,
            on_step=on_step,
        )

    def line(self, index: int, answer: Generation) -> dict[str, Any]:
        """Make an answer's record, for data sets ``chat`` and ``jsonl``."""
        prompt, text = self._prompts[index], self._opened.tokenizer.decode(answer.tokens)
        found: dict[str, Any] = {"index": index, "id": prompt.id, "prompt": prompt.text, "completion": text}
        if self.use_template:
            found |= {
                "prompt": list(self._messages(prompt)),
                "completion": [{"role": "assistant", "content": text}],
            }
            if prompt.tools:
                found["tools"] = list(prompt.tools)
        return found | {"finish": answer.finish}

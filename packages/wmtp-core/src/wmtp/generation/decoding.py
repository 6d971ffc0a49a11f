"""Decoding loop on the CPU: tokens of rows, and their ends.

`Step` is the device's side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from attrs import define, field

from wmtp.errors import ConfigError
from wmtp.generation.base import DraftCounts, Generation, Sampling
from wmtp.generation.kept import close_step, open_step
from wmtp.generation.sampling import Draws
from wmtp.generation.turns import turns_of

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["Stop", "count_drafts", "generate", "stream"]

#: called with a row's new tokens after each one: whether they end here
Stop = Callable[[Sequence[int]], bool]

Finish = Literal["eos", "length", "context", "stop"]


def generate(
    model: MTPModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int] | None,
    speculative: bool | int = False,
    sampling: Sampling | None = None,
    rows: Sequence[int] | None = None,
    stop: Stop | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue each prompt; all prompts are decoded as one batch.

    Args:
        model: in eval mode, on any device.
        prompts: token ids; none empty.
        max_new_tokens: the most tokens that are added to a prompt.
        eos_id: the token that ends a text, or several; None: none does.
        speculative: whether heads 2..H draft; a number: so many of the first of them.
        sampling: default greedy.
        rows: a number for each prompt, which its draws depend on. Default: 0, 1, 2 …
        stop: a further reason to end a row.
        on_step: called after each step with the number of tokens that it gave all rows.

    Returns:
        one generation a prompt, in order, without text.

    Raises:
        ConfigError: a prompt is empty, longer than the model's context or has ids outside its vocabulary; speculation without
            extra heads, or by more than there are; an architecture that cannot be decoded with a cache.
    """
    batch = _Batch(model, prompts, max_new_tokens, eos_id, speculative, sampling or Sampling(), rows, stop)
    for new in batch.steps():
        if on_step is not None:
            on_step(sum(map(len, new.values())))
    return batch.generations()


def stream(
    model: MTPModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int] | None,
    speculative: bool | int = False,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
) -> Iterator[list[int]]:
    """Continue one prompt, and yield the new tokens of each step.

    Arguments and errors are those of `generate`.
    """
    batch = _Batch(model, [prompt], max_new_tokens, eos_id, speculative, sampling or Sampling(), None, stop)
    for new in batch.steps():
        yield new[0]


@define(eq=False)
class _Row:
    """Facts of a row that are known on the CPU."""

    tokens: list[int] = field(factory=list)
    finish: Finish | None = None
    steps: int = 0
    tested: list[int] = field(factory=list)
    accepted: list[int] = field(factory=list)


class _Batch:
    """Rows that are decoded together.

    A row leaves it when it is finished.
    """

    def __init__(
        self,
        model: MTPModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_id: int | Collection[int] | None,
        speculative: bool | int,
        sampling: Sampling,
        numbers: Sequence[int] | None,
        stop: Stop | None,
    ) -> None:
        drafts = count_drafts(model, speculative)
        _check_request(model, prompts, max_new_tokens)
        self._stop = stop
        self._ends = frozenset([eos_id] if isinstance(eos_id, int) else eos_id or ())
        self._most_new = max_new_tokens
        longest = model.max_positions or 2**62
        self._limits = [min(max_new_tokens, longest - len(prompt)) for prompt in prompts]
        self.rows = [_Row(tested=[0] * drafts, accepted=[0] * drafts) for _ in prompts]
        #: which row of the request each row on the device is; None: one that is finished and not dropped yet
        self._active: list[int | None] = list(range(len(prompts)))
        most = max(len(prompt) + limit for prompt, limit in zip(prompts, self._limits, strict=True))
        draws = Draws(sampling.seed, list(numbers) if numbers is not None else list(range(len(prompts))))
        self._model, self._prompts = model, prompts
        self._turns = turns_of(model)
        with self._turns.turn():
            self._opened = self._step = open_step(model, prompts, most, drafts=drafts, sampling=sampling, draws=draws)

    def generations(self) -> list[Generation]:
        """Return the decoded tokens."""
        return [
            Generation(
                tokens=tuple(row.tokens),
                finish=row.finish or "length",
                drafts=DraftCounts(steps=row.steps, tested=tuple(row.tested), accepted=tuple(row.accepted)),
            )
            for row in self.rows
        ]

    def steps(self) -> Iterator[dict[int, list[int]]]:
        """Decode, and yield each step's new tokens by row of the request."""
        with self._turns.request(self._model):
            try:
                with self._turns.turn():
                    found = self._step.begin(self._prompts)
                yield self._take(*found, is_prompt=True)
                while any(number is not None for number in self._active):
                    with self._turns.turn():
                        found = self._step.follow()
                    yield self._take(*found, is_prompt=False)
            finally:  # also of a stream that is left
                self._opened.finish()
            with self._turns.turn():  # other threads open steps of this model
                close_step(self._model, self._opened)

    def _take(self, new: list[list[int]], accepted: list[int], *, is_prompt: bool) -> dict[int, list[int]]:
        """Give each row its new tokens, up to its end.

        Rows that ended are dropped.
        """
        taken: dict[int, list[int]] = {}
        ended = False
        for place, number in enumerate(self._active):
            if number is None:
                continue
            row, before = self.rows[number], len(self.rows[number].tokens)
            for token in new[place][: accepted[place] + 1]:
                row.tokens.append(token)
                row.finish = self._end(row.tokens, self._limits[number])
                if row.finish is not None:
                    break
            taken[number] = row.tokens[before:]
            if not is_prompt:
                row.steps += 1
                for head in range(min(len(taken[number]), len(new[place]) - 1)):
                    row.tested[head] += 1
                    row.accepted[head] += head < accepted[place]
            if row.finish is not None:
                self._active[place], ended = None, True
        going = [place for place, number in enumerate(self._active) if number is not None] if ended else []
        if going:  # rows that ended before are dropped, or kept for the graph, already
            numbers = [number for number in self._active if number is not None]
            left = max(self._limits[number] - len(self.rows[number].tokens) for number in numbers)
            self._step, kept = self._step.with_rows(going, left)
            self._active = [self._active[place] for place in kept]
        return taken

    def _end(self, tokens: list[int], limit: int) -> Finish | None:
        if tokens[-1] in self._ends:
            return "eos"
        if self._stop is not None and self._stop(tokens):
            return "stop"
        if len(tokens) == limit:
            return "length" if limit == self._most_new else "context"
        return None


def count_drafts(model: MTPModel, speculative: bool | int) -> int:
    """Count the drafts of a step; 0 without speculation.

    Raises:
        ConfigError: the model has no heads to draft, or fewer.
    """
    if not isinstance(speculative, Integral) or speculative < 0:
        raise ConfigError(f"speculative: must be true, false or a number of drafts, not {speculative!r:.60}")
    most = model.horizon - 1
    if speculative and not most:
        raise ConfigError(
            "this model has no extra heads (H = 1), so nothing can draft: leave speculation out, or train heads with wmtp run"
        )
    drafts = most * speculative if isinstance(speculative, bool) else int(speculative)
    if drafts > most:
        raise ConfigError(f"speculative: {drafts} drafts a step; the heads of this model draft at most {most} (H = {most + 1})")
    return drafts


def _check_request(model: MTPModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be a whole number, at least 1, not {max_new_tokens!r}")
    if not prompts:
        raise ConfigError("there is no prompt")
    vocab_size = model.anatomy.embedding.num_embeddings
    for number, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not len(prompt):
            raise ConfigError(f"{name} is empty; give at least one token")
        longest = model.max_positions
        if longest is not None and len(prompt) >= longest:
            raise ConfigError(
                f"{name} has {len(prompt)} tokens, and the model's context is {longest}: shorten it to at most {longest - 1}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f"{name} has token ids outside the model's vocabulary of {vocab_size}; use the model's own tokenizer"
            )

"""Requests to a decoder, and its results. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attrs import field, frozen
from attrs.validators import ge, gt, instance_of, le

from wmtp.errors import ConfigError

__all__ = ["DraftCounts", "Generation", "Sampling", "check_stop"]


@frozen(kw_only=True)
class Sampling:
    """Choice of the next token.

    Args:
        temperature: logits are divided by it; 0 takes the most probable token (greedy).
        top_p: only the most probable tokens that together reach this probability are drawn (nucleus sampling,
            arXiv 1904.09751); 1 takes all.
        seed: of the draws. A row's draws depend on this and on the row's own number, not on the other rows of its batch.
    """

    temperature: float = field(default=0.0, validator=[instance_of((int, float)), ge(0.0)])
    top_p: float = field(default=1.0, validator=[instance_of((int, float)), gt(0.0), le(1.0)])
    seed: int = field(default=0, validator=[instance_of(int), ge(0)])

    @property
    def greedy(self) -> bool:
        """True if nothing is drawn."""
        return self.temperature == 0.0


@frozen(kw_only=True)
class DraftCounts:
    """Counts of tested and accepted drafts of heads 2..H in one row.

    Args:
        steps: forward passes of the model after the one that read the prompt.
        tested: for heads 2..H, how many of its drafts were reached: all drafts before it in the same step were accepted.
        accepted: how many of those were accepted.
    """

    steps: int
    tested: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


@frozen(kw_only=True)
class Generation:
    """Completion of one prompt. ``str()`` of it is the text.

    Args:
        tokens: the new tokens; an end-of-sequence token that ended them is the last one.
        finish: ``eos``; ``length``: as many tokens as were asked for; ``context``: the model has no position for another
            one; ``stop``: the caller's stop condition held.
        drafts: steps, and drafts tested and accepted.
        text: the tokens' text; None without a tokenizer.
    """

    tokens: tuple[int, ...]
    finish: Literal["eos", "length", "context", "stop"]
    drafts: DraftCounts
    text: str | None = None

    def __str__(self) -> str:
        return self.text if self.text is not None else " ".join(map(str, self.tokens))

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per forward pass after the prompt's; NaN without any."""
        return (len(self.tokens) - 1) / self.drafts.steps if self.drafts.steps else float("nan")


def check_stop(stop: Sequence[str]) -> None:
    """Check the texts that end a completion.

    Raises:
        ConfigError: they are one text, whose letters each would end it, one is none, or is empty, which would end all at once.
    """
    if isinstance(stop, str):
        raise ConfigError(f"stop: is one text, not several; write [{stop!r}]")
    if others := [item for item in stop if not isinstance(item, str)]:
        raise ConfigError(f"stop: {others[0]!r:.60} is no text; give texts, or eos_id for a token")
    if "" in stop:
        raise ConfigError("stop: an empty text would end every completion at once; give texts, or leave it out")


def total(counts: Sequence[DraftCounts]) -> DraftCounts:
    """Sum the counts over rows."""
    heads = max((len(row.tested) for row in counts), default=0)
    return DraftCounts(
        steps=sum(row.steps for row in counts),
        tested=tuple(sum(row.tested[k] for row in counts) for k in range(heads)),
        accepted=tuple(sum(row.accepted[k] for row in counts) for k in range(heads)),
    )

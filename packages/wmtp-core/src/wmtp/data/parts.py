"""Texts and token weights of an example without messages."""

from __future__ import annotations

import math
from collections.abc import Sequence

from wmtp.data.base import BadExample, Example, Span
from wmtp.data.conversation import Part
from wmtp.data.tokenized import CONTEXT, LEARNED, NEVER

__all__ = ["text_parts", "token_weights", "weighted_spans"]


def weighted_spans(example: Example) -> Sequence[Span] | None:
    """List an example's spans; None where none has token weights."""
    if example.weights is None and example.spans is None:
        return None
    spans = _spans(example)
    return spans if any(span.token_weights is not None for span in spans) else None


def text_parts(example: Example) -> list[Part]:
    """List the texts of an example that is no conversation."""
    if example.weights is None and example.spans is None:
        learned = Part(example.completion, LEARNED)
        return [Part(example.prompt, CONTEXT), learned] if example.prompt else [learned]
    return [
        Part(span.text, NEVER if not span.weight else LEARNED if span.learn else CONTEXT, span.weight or 1.0)
        for span in _spans(example)
    ]


def token_weights(spans: Sequence[Span], counts: Sequence[int], example: Example) -> tuple[list[float], float]:
    """Collect the data's weight of each token, and the end token's.

    The second number is for an end token to which the data gives none. The last span may have one more than tokens: it is that
    of the end token.
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
    # a document whose weights are all 0 teaches nothing, its end neither
    return found, 0.0 if all_given and not any(all_given) else 1.0


def _spans(example: Example) -> Sequence[Span]:
    """List the spans of an example that has some, or weights.

    Raises:
        BadExample: the texts of its weights are not its completion.
    """
    if example.spans is not None:
        return example.spans
    prompt = [Span(example.prompt, learn=False)] if example.prompt else []
    weights = example.weights or ()
    if weights and isinstance(weights[0], tuple):
        pairs: Sequence[tuple[str, float]] = weights  # type: ignore[assignment]
        if "".join(text for text, _ in pairs) != example.completion:
            raise BadExample(example.place, "the texts of its weights, joined, are not the completion")
        return [*prompt, *(Span(text, token_weights=float(weight)) for text, weight in pairs)]
    return [*prompt, Span(example.completion, token_weights=tuple(float(weight) for weight in weights))]  # type: ignore[arg-type]

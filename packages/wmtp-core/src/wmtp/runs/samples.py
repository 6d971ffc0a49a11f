"""Texts of a run, token by token, as a notebook shows them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from wmtp.json_files import reading
from wmtp.runs.step_file import read_steps

__all__ = ["TokenSample", "read_samples"]

_MORE = "230, 120, 20"  # orange, as in `wmtp report`
_LESS = "40, 110, 220"


@frozen(kw_only=True)
class TokenSample:
    """A text of ``samples.jsonl`` with its tokens' weights and losses.

    A notebook shows it in colours.

    Args:
        step: at which it was recorded.
        id: of the document.
        tokens: their texts.
        weight: for each head one number a token, None where it predicts none; None in a stage without weights.
        loss: likewise, the token losses.
    """

    step: int
    id: str
    tokens: Sequence[str]
    weight: Sequence[Sequence[float | None]] | None
    loss: Sequence[Sequence[float | None]]

    def _repr_html_(self) -> str:
        """Colour each token by the weight of its head-1 prediction.

        Orange above the mean, blue below it.
        """
        weights = self.weight[0] if self.weight else [None] * len(self.tokens)
        known = [weight for weight in weights if weight is not None]
        mean = sum(known) / len(known) if known else 1.0
        spans = "".join(
            _span(token, weight, loss, mean) for token, weight, loss in zip(self.tokens, weights, self.loss[0], strict=True)
        )
        about = html.escape(f"{self.id}, step {self.step}: orange weighs more than the mean of {mean:.3g}, blue less")
        return f'<div style="font-size:small">{about}</div><pre style="white-space:pre-wrap">{spans}</pre>'


def _span(token: str, weight: float | None, loss: float | None, mean: float) -> str:
    text = html.escape(token)
    if weight is None:
        return f'<span style="opacity:0.6">{text}</span>'
    far = math.log2(max(weight, 1e-9) / mean) if mean > 0 else 0.0
    title = f"weight {weight:.4g}" + ("" if loss is None else f", loss {loss:.4g}")
    colour = f"rgba({_MORE if far > 0 else _LESS}, {min(abs(far) / 3, 1) * 0.6:.2f})"
    return f'<span title="{title}" style="background:{colour}">{text}</span>'


def read_samples(path: Path) -> list[TokenSample]:
    """Read the last recorded step's texts; none without a file."""
    records = read_steps(path) if path.exists() else []
    with reading(path):
        return [_sample(records[-1]["step"], document) for document in records[-1]["documents"]] if records else []


def _sample(step: int, document: Mapping[str, Any]) -> TokenSample:
    return TokenSample(
        step=step, id=document["id"], tokens=document["tokens"], weight=document["weight"], loss=document["loss"]
    )

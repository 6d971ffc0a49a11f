"""Config classes of the built-in evaluators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from wmtp.evaluation.base import Evaluator

__all__ = ["Perplexity"]


@frozen(kw_only=True)
class Perplexity:
    """The perplexity of every head: exp of its mean token loss on ``[data.eval]``, over valid predictions only."""

    type = "perplexity"
    needs_eval_data = True

    def build(self) -> Evaluator:
        """Make the evaluator."""
        from wmtp.evaluation.perplexity import PerplexityEvaluator

        return PerplexityEvaluator()

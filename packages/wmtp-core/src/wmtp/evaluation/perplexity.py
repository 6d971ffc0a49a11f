"""Evaluators of perplexity and accuracy of every head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from wmtp.evaluation.base import Estimate, Evaluator, Measured
from wmtp.evaluation.tokens import correct, losses, token_results

__all__ = ["PerplexityEvaluator", "TokenAccuracyEvaluator"]


class PerplexityEvaluator(Evaluator):
    """Perplexity of head k: exp of its mean cross entropy.

    Exact over any batch size.
    """

    def evaluate(self, measured: Measured) -> Mapping[str, Estimate]:
        """Return ``head_k`` for each head, and by bucket; see `token_results`."""
        return token_results(measured, losses, np.exp)


class TokenAccuracyEvaluator(Evaluator):
    """Accuracy of head k's most probable token, exact over any batch size."""

    def evaluate(self, measured: Measured) -> Mapping[str, Estimate]:
        """Return ``head_k`` for each head, and by bucket; see `token_results`."""
        return token_results(measured, correct)

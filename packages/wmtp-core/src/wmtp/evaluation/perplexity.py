"""The perplexity of every head."""

from __future__ import annotations

import math
from collections.abc import Mapping

from wmtp.distributed.ranks import ALONE
from wmtp.evaluation.base import Evaluator, Measured
from wmtp.training.evaluate import evaluate

__all__ = ["PerplexityEvaluator"]


class PerplexityEvaluator(Evaluator):
    """exp of the mean cross entropy of head k, in nats per token, exact over any batch size."""

    def evaluate(self, measured: Measured) -> Mapping[str, float]:
        """``head_k`` for every head that has a valid prediction; see `Evaluator.evaluate`."""
        ranks = measured.ranks or ALONE
        losses = evaluate(measured.model, measured.batches, measured.device, measured.autocast, ranks)
        prefix = "eval/loss/"
        return {name.removeprefix(prefix): math.exp(loss) for name, loss in losses.items() if name.startswith(prefix)}

"""What a person sees of a run: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

__all__ = ["Progress"]

logger = logging.getLogger("wmtp")

#: seconds between two lines in a log
_LINE_INTERVAL = 10.0


class Progress:
    """Shows how far a run is.

    Args:
        total: optimizer steps of the whole job.
        start: optimizer steps done already.
    """

    def __init__(self, total: int, start: int) -> None:
        self._total = total
        self._shown = start
        self._last = 0.0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=sys.stderr)

    def show(self, step: int, metrics: Mapping[str, float], *, always: bool = False) -> None:
        """Show the state after ``step`` steps; a log gets a line only now and then, unless ``always``."""
        facts = _summary(metrics)
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(step - self._shown)
            self._shown = step
        elif always or step == self._total or time.monotonic() - self._last >= _LINE_INTERVAL:
            self._last = time.monotonic()
            logger.info("step %d/%d  %s", step, self._total, facts)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _summary(metrics: Mapping[str, float]) -> str:
    heads = [f"{value:.3f}" for name, value in metrics.items() if name.startswith("loss/head_")]
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    if len(heads) > 1:
        parts.append(f"heads {' '.join(heads)}")
    if "eval/loss" in metrics:
        parts.append(f"eval {metrics['eval/loss']:.4f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)

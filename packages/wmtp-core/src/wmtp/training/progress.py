"""Progress of a run: a bar on a terminal, one updating line in a notebook, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from wmtp.log_lines import in_notebook

__all__ = ["Progress"]

logger = logging.getLogger("wmtp")

#: seconds between two lines in a log, and between two updates of a cell
_LINE_INTERVAL: Final = 10.0
_CELL_INTERVAL: Final = 0.5


class Progress:
    """Shows how far a run is; nothing where the logger ``wmtp`` is set to warnings.

    Args:
        total: optimizer steps of the whole job.
        start: optimizer steps done already.
    """

    def __init__(self, total: int, start: int) -> None:
        self._total = total
        self._shown = start
        self._last = 0.0
        self._bar: Any = None
        self._cell: Any = None
        self._is_quiet = logger.level > logging.INFO
        self._in_notebook = in_notebook() and not self._is_quiet
        if sys.stderr.isatty() and not self._in_notebook and not self._is_quiet:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=sys.stderr)

    def show(self, step: int, metrics: Mapping[str, float], *, always: bool = False) -> None:
        """Show the state after ``step`` steps; a log gets a line only now and then, unless ``always``."""
        facts = _summary(metrics)
        is_due = always or step == self._total
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(step - self._shown)
            self._shown = step
        elif is_due or time.monotonic() - self._last >= (_CELL_INTERVAL if self._in_notebook else _LINE_INTERVAL):
            self._last = time.monotonic()
            line = f"step {step}/{self._total}  {facts}"
            if self._in_notebook:
                self._update_cell(line)
            else:
                logger.info("%s", line)

    def close(self) -> None:
        """Leave what is shown as it is."""
        if self._bar is not None:
            self._bar.close()

    def _update_cell(self, line: str) -> None:
        """Replace the line in the output of the cell that runs."""
        content = {"text/plain": line}
        if self._cell is None:
            self._cell = sys.modules["IPython"].display.display(content, raw=True, display_id=True)
        else:
            self._cell.update(content, raw=True)


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

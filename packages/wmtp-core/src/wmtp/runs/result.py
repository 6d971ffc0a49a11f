"""Result of a run."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from wmtp.runs.samples import TokenSample, read_samples
from wmtp.runs.step_file import read_steps

__all__ = ["Result"]


@frozen(kw_only=True)
class Result:
    """Return value of `wmtp.run`, printed by ``wmtp run FILE --json``.

    Args:
        run_dir: the run directory.
        model: the trained model: a Hugging Face folder plus the extra heads. None if training was interrupted.
        checkpoint: the newest checkpoint; None if none was asked for.
        steps: optimizer steps done, over all resumes.
        metrics: the last logged value of every metric.
        status: ``finished``; ``stopped`` by early stopping; ``interrupted`` by a signal, with a checkpoint to resume from.
        signal: ``SIGINT`` or ``SIGTERM``, which ended the run, or the wait for its tracker when it was done; None for none.
    """

    run_dir: Path
    model: Path | None
    checkpoint: Path | None
    steps: int
    metrics: Mapping[str, float]
    status: str = "finished"
    signal: str | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every logged step with its metrics, for instance for ``pandas.DataFrame(result.history)``."""
        path = self.run_dir / "metrics.jsonl"
        return read_steps(path) if path.exists() else []

    @property
    def samples(self) -> list[TokenSample]:
        """Texts of the last recorded step (``[report]``), with token weights."""
        return read_samples(self.run_dir / "samples.jsonl")

    def report(self, output: str | os.PathLike[str] | None = None) -> Path:
        """Write the run's page, as ``wmtp report`` does; return its path.

        Args:
            output: the file. Default: ``report.html`` in the run directory.
        """
        from wmtp.reporting import write_report

        return write_report([self.run_dir], None if output is None else Path(output))

    def _repr_html_(self) -> str:
        """Show status, losses, their curve and paths in a notebook."""
        losses = {name: value for name, value in self.metrics.items() if name.removeprefix("eval/").startswith("loss")}
        facts = {
            "status": f"{self.status} after {self.steps} steps",
            **{name: f"{value:.4g}" for name, value in losses.items()},
            "run": self.run_dir,
            "model": self.model,
        }
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in facts.items()
            if value is not None
        )
        return f"{_curve([row['loss'] for row in self.history if 'loss' in row])}<table>{rows}</table>"


def _curve(values: Sequence[float]) -> str:
    """Draw a curve as SVG; nothing for fewer than two points."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    points = " ".join(
        f"{300 * index / (len(values) - 1):.1f},{58 - 56 * (value - low) / ((high - low) or 1):.1f}"
        for index, value in enumerate(values)
    )
    label = f"loss from {values[0]:.4g} to {values[-1]:.4g}"
    return (
        f'<svg width="300" height="60" role="img" aria-label="{label}"><title>{label}</title>'
        f'<polyline points="{points}" fill="none" stroke="currentColor"/></svg>'
    )

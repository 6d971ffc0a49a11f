"""How a run that has ended is reported."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from wmtp.cli.facts import print_facts
from wmtp.runs.result import Result

__all__ = ["report"]

logger = logging.getLogger("wmtp")


def report(result: Result, *, to_stdout: bool) -> tuple[dict[str, Any], int]:
    """The answer for ``--json`` and the exit code; printed too where ``to_stdout`` says so."""
    answer = {
        "run_dir": result.run_dir,
        "model": result.model,
        "checkpoint": result.checkpoint,
        "steps": result.steps,
        "metrics": dict(result.metrics),
        "status": result.status,
    }
    if to_stdout:
        facts = {
            "status": f"{result.status} after {result.steps} steps",
            "run": result.run_dir,
            "model": result.model,
            "metrics": result.run_dir / "metrics.jsonl",
            "checkpoint": result.checkpoint,
            **{name: f"{result.metrics[name]:.4g}" for name in _headline(result.metrics)},
        }
        print_facts(facts)
    if result.status == "interrupted":
        logger.info("interrupted; go on with: wmtp run --resume %s", result.run_dir)
        return answer, 1
    return answer, 0


def _headline(metrics: Mapping[str, float]) -> list[str]:
    """The losses: of training, of evaluation, and of each head."""
    return [name for name in metrics if name.removeprefix("eval/").startswith("loss")]

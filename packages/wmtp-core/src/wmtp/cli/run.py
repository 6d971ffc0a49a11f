"""Report of a run that has ended."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from typing import Any

from wmtp.cli.facts import print_facts
from wmtp.json_files import read_json_object
from wmtp.runs.result import Result

__all__ = ["outcome", "report"]

logger = logging.getLogger("wmtp")


def outcome(train: Callable[[], Result]) -> Result:
    """Train, and return the result of an interrupted run too.

    Here no next run follows, which `wmtp.run` prevents by raising KeyboardInterrupt.
    """
    try:
        return train()
    except KeyboardInterrupt as error:
        if (result := getattr(error, "result", None)) is None:
            raise
        return result


def report(result: Result, *, to_stdout: bool) -> tuple[dict[str, Any], int]:
    """Return the ``--json`` answer and the exit code of a run.

    With ``to_stdout`` the facts are printed. After a signal the code is the one that a shell gives to a process that died of
    it: 130 or 143.
    """
    answer = {
        "run_dir": result.run_dir,
        "model": result.model,
        "checkpoint": result.checkpoint,
        "steps": result.steps,
        "metrics": dict(result.metrics),
        "status": result.status,
        "signal": result.signal,
    }
    if to_stdout:
        facts = {
            "status": f"{result.status} after {result.steps} steps",
            "run": result.run_dir,
            "model": result.model,
            "metrics": result.run_dir / "metrics.jsonl",
            "checkpoint": result.checkpoint,
            **{name: f"{result.metrics[name]:.4g}" for name in (*_headline(result.metrics), *_measured(result))},
        }
        print_facts(facts)
    if result.status == "interrupted":
        logger.info("interrupted; to resume: wmtp run --resume %s", result.run_dir)
    if result.signal is not None:
        return answer, 128 + signal.Signals[result.signal]
    return answer, 1 if result.status == "interrupted" else 0


def _measured(result: Result) -> list[str]:
    """Select what the evaluators of ``[[eval]]`` have found."""
    from wmtp.evaluation.measure import NUMBERS_FILE

    file = result.run_dir / NUMBERS_FILE
    return [name for name in read_json_object(file) if name in result.metrics] if file.is_file() else []


def _headline(metrics: Mapping[str, float]) -> list[str]:
    """Select the losses: of training, of evaluation, and of each head."""
    return [name for name in metrics if name.removeprefix("eval/").startswith("loss")]

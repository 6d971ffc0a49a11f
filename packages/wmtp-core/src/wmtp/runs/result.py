"""What a run leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

__all__ = ["Result"]


@frozen(kw_only=True)
class Result:
    """What `wmtp.run` returns, and ``wmtp run --json`` prints.

    Args:
        run_dir: the run directory.
        model: the trained model: a Hugging Face folder plus the extra heads. None if training was interrupted.
        checkpoint: the newest checkpoint; None if none was asked for.
        steps: optimizer steps done, over all resumes.
        metrics: the last logged value of every metric.
        status: ``finished``; ``stopped`` by early stopping; ``interrupted`` by a signal, with a checkpoint to resume from.
        signal: the signal that ended the run, ``SIGINT`` or ``SIGTERM``; None for none.
    """

    run_dir: Path
    model: Path | None
    checkpoint: Path | None
    steps: int
    metrics: Mapping[str, float]
    status: str = "finished"
    signal: str | None = None

"""Tracker without a service: every run writes ``metrics.jsonl`` by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from wmtp.tracking.base import RunInfo, Tracker

__all__ = ["Jsonl"]


class Jsonl(Tracker):
    """Says where the run's own ``metrics.jsonl`` is."""

    def __init__(self) -> None:
        self._file: Path | None = None

    def start(self, run: RunInfo) -> None:
        """See `Tracker.start`."""
        self._file = run.run_dir / "metrics.jsonl"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing: the loop has written them already."""

    def finish(self, status: Literal["finished", "stopped", "interrupted", "failed"], model: Path | None) -> None:
        """Nothing: there is nothing to close."""

    def location(self) -> str | None:
        """Path of ``metrics.jsonl``."""
        return None if self._file is None else str(self._file)

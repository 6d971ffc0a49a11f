"""Where parameters and metrics go besides ``metrics.jsonl``."""

from wmtp.tracking.base import RunInfo, Tracker

__all__ = ["RunInfo", "Tracker"]

"""Lines on standard error."""

from __future__ import annotations

import logging
import sys

__all__ = ["set_up_logging"]


def set_up_logging(*, verbose: bool, rank: int = 0) -> None:
    """Write log lines to standard error: all of rank 0, of other ranks warnings with their number."""
    logger = logging.getLogger("wmtp")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(f"rank {rank}: " if rank else ""))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if rank else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


class _Lines(logging.Formatter):
    """Plain lines; only a warning says that it is one."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {self._prefix}{text}" if record.levelno >= logging.WARNING else text

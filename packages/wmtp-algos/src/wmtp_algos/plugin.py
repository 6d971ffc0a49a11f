"""Register the algorithms of wmtp-algos. Imports no torch."""

from __future__ import annotations

import wmtp
import wmtp_algos

__all__ = ["wmtp_trainers"]


@wmtp.hookimpl
def wmtp_trainers() -> list[type]:
    """Return the algorithms."""
    return [getattr(wmtp_algos, name) for name in wmtp_algos.__all__]

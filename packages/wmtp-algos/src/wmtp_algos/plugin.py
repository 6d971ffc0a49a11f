"""What wmtp-algos adds to WMTP. Imports no torch."""

from __future__ import annotations

import wmtp
from wmtp_algos.baseline_mtp_config import BaselineMTP

__all__ = ["wmtp_trainers"]


@wmtp.hookimpl
def wmtp_trainers() -> list[type]:
    """The algorithms."""
    return [BaselineMTP]

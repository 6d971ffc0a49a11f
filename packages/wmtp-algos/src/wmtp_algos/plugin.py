"""What wmtp-algos adds to WMTP. Imports no torch."""

from __future__ import annotations

import wmtp
from wmtp_algos import config

__all__ = ["wmtp_trainers"]


@wmtp.hookimpl
def wmtp_trainers() -> list[type]:
    """The algorithms."""
    return [getattr(config, name) for name in config.__all__]

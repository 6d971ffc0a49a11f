"""What wmtp-algos adds to WMTP. Imports no torch."""

from __future__ import annotations

import wmtp
from wmtp_algos import config, critic_config

__all__ = ["wmtp_trainers"]


@wmtp.hookimpl
def wmtp_trainers() -> list[type]:
    """The algorithms."""
    return [getattr(module, name) for module in (config, critic_config) for name in module.__all__]

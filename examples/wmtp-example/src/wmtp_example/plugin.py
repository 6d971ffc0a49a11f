"""Register the algorithms of this package.

It is read whenever `wmtp` starts, so it imports no torch.
"""

from __future__ import annotations

import wmtp
from wmtp_example.loss_ceiling import LossCeiling
from wmtp_example.loss_truncation import LossTruncation

__all__ = ["wmtp_trainers"]


@wmtp.hookimpl
def wmtp_trainers() -> list[type]:
    """Return the algorithms."""
    return [LossCeiling, LossTruncation]

"""The config of baseline-mtp."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from wmtp.training import Trainer

__all__ = ["BaselineMTP"]


@frozen(kw_only=True)
class BaselineMTP:
    """Plain multi-token prediction (Gloeckle et al., arXiv 2404.19737): every prediction counts the same, w = 1."""

    type = "baseline-mtp"

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.baseline_mtp import BaselineMTPTrainer

        return BaselineMTPTrainer()

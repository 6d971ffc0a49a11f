"""The training loop, and the contract of an algorithm.

Importing this package imports torch only once one of its names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmtp.training.trainer import HiddenView, OpenModel, RewardScores, Stage, StepView, Trainer, TrainerSetup

__all__ = ["HiddenView", "OpenModel", "RewardScores", "Stage", "StepView", "Trainer", "TrainerSetup"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from wmtp.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

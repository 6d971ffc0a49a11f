"""The contract of an algorithm, and the checks of what it returns. Names are loaded when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmtp.trainers.base import HiddenView, OpenModel, RewardScores, Stage, StepView, Trainer, TrainerSetup

__all__ = ["HiddenView", "OpenModel", "RewardScores", "Stage", "StepView", "Trainer", "TrainerSetup"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from wmtp.trainers import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Contract of an algorithm, and checks of what it returns. Names are loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmtp.trainers.base import HiddenView, Stage, StepView, Trainer
    from wmtp.trainers.setup import OpenModel, RewardScores, TrainerSetup

__all__ = ["HiddenView", "OpenModel", "RewardScores", "Stage", "StepView", "Trainer", "TrainerSetup"]

_SETUP = ("OpenModel", "RewardScores", "TrainerSetup")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"wmtp.trainers.{'setup' if name in _SETUP else 'base'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

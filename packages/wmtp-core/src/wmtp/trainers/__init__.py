"""Contract of an algorithm, and checks of what it returns. Names are loaded when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wmtp.lazy import lazy_names

if TYPE_CHECKING:
    from wmtp.trainers.base import OpenModel, RewardScores, Stage, Trainer, TrainerSetup
    from wmtp.trainers.views import HiddenView, StepView

__all__ = ["HiddenView", "OpenModel", "RewardScores", "Stage", "StepView", "Trainer", "TrainerSetup"]

_VIEWS = ("HiddenView", "StepView")
__getattr__ = lazy_names(__name__, {name: f"wmtp.trainers.{'views' if name in _VIEWS else 'base'}" for name in __all__})

"""Contract of an algorithm, and checks of what it returns.

Names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wmtp.lazy import lazy_names

if TYPE_CHECKING:
    from wmtp.trainers.base import HiddenView, PredictionChunk, Stage, StepView, Trainer
    from wmtp.trainers.setup import OpenModel, RewardScores, TrainerSetup

__all__ = ["HiddenView", "OpenModel", "PredictionChunk", "RewardScores", "Stage", "StepView", "Trainer", "TrainerSetup"]

_SETUP = ("OpenModel", "RewardScores", "TrainerSetup")
__getattr__ = lazy_names(__name__, {name: f"wmtp.trainers.{'setup' if name in _SETUP else 'base'}" for name in __all__})

"""Training loop."""

from __future__ import annotations

from typing import NoReturn

_MOVED = ("HiddenView", "OpenModel", "RewardScores", "Stage", "StepView", "Trainer", "TrainerSetup")


def __getattr__(name: str) -> NoReturn:
    if name in _MOVED:  # an ImportError: of an AttributeError `from … import` would drop the text
        raise ImportError(f"{name} is in wmtp.trainers now; write: from wmtp.trainers import {name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

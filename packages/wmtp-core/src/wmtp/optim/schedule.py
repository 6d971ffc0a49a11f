"""The learning rate over the optimizer steps of a whole job."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wmtp.config.schema import ScheduleConfig

__all__ = ["learning_rate_factor"]


def learning_rate_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """The factor of the peak learning rate at one optimizer step.

    A pure function of the step, so that a resumed run cannot differ. The warm-up ends, and the decay begins, at 1; the decay
    would be at ``min_ratio`` one step after the last, so that the last step still learns where that is 0.

    Args:
        schedule: its shape.
        step: the optimizer step, from 0.
        total_steps: of the whole job.
    """
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.floor((schedule.warmup_ratio or 0.0) * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.type == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    falling = 1.0 - progress if schedule.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * falling

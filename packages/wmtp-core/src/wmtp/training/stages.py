"""Which stage an optimizer step belongs to, and what learns in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import evolve, frozen
from torch import nn

from wmtp.errors import ConfigError, PluginError
from wmtp.training.trainer import Stage

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["StagePlan", "apply_stage"]


@frozen(kw_only=True)
class StagePlan:
    """The stages of a run and the steps at which they end.

    Args:
        stages: in order.
        ends: the step after the last one of each stage; ascending.
    """

    stages: Sequence[Stage]
    ends: Sequence[int]

    @classmethod
    def make(cls, stages: Sequence[Stage], *, warmup_steps: int, total_steps: int, trainer_name: str) -> StagePlan:
        """Put the heads' warm-up before the trainer's stages, and lay them all out over the run.

        Raises:
            ConfigError: the stages with a fixed length fill the whole run, so that the last one would never start.
            PluginError: a stage other than the last has no length, or one has a negative length.
        """
        if not stages or any(stage.steps is None for stage in stages[:-1]):
            raise PluginError(f"{trainer_name}: every stage but the last needs a number of steps")
        if negative := [stage.name for stage in stages if stage.steps is not None and stage.steps < 0]:
            raise PluginError(f"{trainer_name}: stage {negative[0]!r} has a negative number of steps")
        if warmup_steps:
            stages = [Stage(name="head-warmup", steps=warmup_steps, frozen=frozenset({"model"})), *stages]
        ends, end = [], 0
        for stage in stages:
            if end >= total_steps:
                raise ConfigError(
                    f"train.max_steps: the run has {total_steps} steps, and stage {stage.name!r} would start after {end}; "
                    f"make the run longer or the stages before it shorter"
                )
            end = total_steps if stage.steps is None else min(total_steps, end + stage.steps)
            ends.append(end)
        if ends[-1] < total_steps:
            stages = [*stages[:-1], evolve(stages[-1], steps=None)]
            ends[-1] = total_steps
        return cls(stages=tuple(stages), ends=tuple(ends))

    def at(self, step: int) -> Stage:
        """The stage of an optimizer step, from 0."""
        return next(stage for stage, end in zip(self.stages, self.ends, strict=True) if step < end)


def apply_stage(stage: Stage, model: MTPModel, modules: Mapping[str, nn.Module], trainer_name: str) -> None:
    """Let learn what the stage lets learn, and nothing else.

    Raises:
        PluginError: the stage freezes something that does not exist, or everything.
    """
    parts: dict[str, nn.Module] = {"model": model.base, "heads": model.extra_heads, **modules}
    if unknown := stage.frozen - parts.keys():
        raise PluginError(
            f"{trainer_name}: stage {stage.name!r} freezes {', '.join(map(repr, sorted(unknown)))}; there is {', '.join(parts)}"
        )
    for name, part in parts.items():
        for parameter in part.parameters():
            parameter.requires_grad_(name not in stage.frozen)
            if name in stage.frozen:
                parameter.grad = None
    if not any(parameter.requires_grad for part in parts.values() for parameter in part.parameters()):
        raise PluginError(f"{trainer_name}: stage {stage.name!r} freezes everything, so nothing can learn")

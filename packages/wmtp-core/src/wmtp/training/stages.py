"""Which stage an optimizer step belongs to, and what learns in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from attrs import evolve, frozen
from torch import nn

from wmtp.data.batches import StepBatches
from wmtp.errors import ConfigError, PluginError
from wmtp.trainers.base import Stage, Trainer

if TYPE_CHECKING:
    from wmtp.config.schema import TrainDataConfig
    from wmtp.data.dataset import TokenDataset
    from wmtp.models.mtp import MTPModel

__all__ = ["StageBatches", "StagePlan", "apply_stage", "check_data"]


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
        if stages[-1].until is not None:
            raise PluginError(
                f"{trainer_name}: the last stage ends with the run, not by a metric; train.early_stopping is for that"
            )
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

    def index(self, step: int) -> int:
        """The number of the stage of an optimizer step; all from 0."""
        return next(number for number, end in enumerate(self.ends) if step < end)

    def at(self, step: int) -> Stage:
        """The stage of an optimizer step, from 0."""
        return self.stages[self.index(step)]

    def ended(self, step: int) -> StagePlan:
        """The plan in which the stage of the step before this one ends here; what follows starts earlier."""
        current = self.index(step - 1)
        sooner = self.ends[current] - step
        moved = [end - sooner for end in self.ends[current:-1]]
        return evolve(self, ends=(*self.ends[:current], *moved, self.ends[-1]))


class StageBatches:
    """The batches of a run, in which each stage may have documents and an order of its own.

    Args:
        by_stage: one a stage; stages that share one go on in its order.
    """

    def __init__(self, by_stage: Sequence[StepBatches]) -> None:
        self._by_stage = by_stage

    @classmethod
    def make(
        cls, plan: StagePlan, trainer: Trainer, dataset: TokenDataset, config: TrainDataConfig, *, seed: int, trainer_name: str
    ) -> StageBatches:
        """Ask the trainer what each stage learns from.

        Raises:
            ConfigError: documents that must be together have no room in a batch.
            PluginError: the trainer returned something else than a number for each piece, or leaves nothing to learn from.
        """
        made: dict[bytes | None, StepBatches] = {}
        by_stage = []
        for stage in plan.stages:
            units = trainer.units(dataset, stage)
            if units is not None:
                units = np.asarray(units)
                if units.shape != (len(dataset),) or units.dtype.kind not in "iu":
                    raise PluginError(
                        f"{trainer_name}: units returned {units.dtype} of shape {list(units.shape)} for stage {stage.name!r}; "
                        f"it must be a whole number for each of {len(dataset)} pieces"
                    )
                units = units.astype(np.int64)
                if not (units >= 0).any():
                    raise PluginError(f"{trainer_name}: units leaves no document to stage {stage.name!r}")
            key = None if units is None else units.tobytes()
            if key not in made:
                made[key] = StepBatches(dataset, config, seed=seed, units=units)
            by_stage.append(made[key])
        return cls(by_stage)

    @property
    def fingerprint(self) -> str:
        """See `StepBatches.fingerprint`."""
        return self._by_stage[0].fingerprint

    def at(self, plan: StagePlan, step: int) -> tuple[StepBatches, int]:
        """What an optimizer step of the run learns from, and which step of that it is.

        Args:
            plan: of the run, as it is by now.
            step: from 0.
        """
        current = plan.index(step)
        batches = self._by_stage[current]
        starts = (0, *plan.ends)
        before = sum(plan.ends[number] - starts[number] for number in range(current) if self._by_stage[number] is batches)
        return batches, before + step - starts[current]


def check_data(trainer: Trainer, dataset: TokenDataset, trainer_name: str) -> None:
    """Raise what the trainer finds wrong with the training data.

    Raises:
        ConfigError: it found something.
        PluginError: what it found is no list of texts.
    """
    problems = trainer.check_data(dataset)
    if not isinstance(problems, list | tuple) or not all(isinstance(problem, str) for problem in problems):
        raise PluginError(
            f"{trainer_name}: check_data returned {problems!r:.60}; it must be one text for each problem, in a list"
        )
    if problems:
        raise ConfigError(problems)


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

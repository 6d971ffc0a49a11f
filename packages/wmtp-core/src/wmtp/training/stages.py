"""Stages of a run, and the one source of its batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

from attrs import evolve, frozen
from torch import nn

from wmtp.data.batches import StepBatches
from wmtp.errors import ConfigError, PluginError
from wmtp.trainers.base import Stage, Trainer
from wmtp.trainers.declarations import checked_groups, checked_stages
from wmtp.training.trainer_modules import HEAD_WARMUP

if TYPE_CHECKING:
    from wmtp.config.schema import TrainDataConfig
    from wmtp.data.batch import Batch
    from wmtp.data.dataset import TokenDataset
    from wmtp.models.mtp import MTPModel

__all__ = ["Prefetcher", "StageBatches", "StagePlan", "StepData", "apply_stage"]

T = TypeVar("T")


@frozen(kw_only=True)
class StagePlan:
    """Stages of a run, with the steps at which they end.

    Args:
        stages: in order.
        ends: the step after the last one of each stage; ascending.
    """

    stages: Sequence[Stage]
    ends: Sequence[int]

    @classmethod
    def make(cls, stages: Sequence[Stage], *, warmup_steps: int, total_steps: int, trainer_name: str) -> StagePlan:
        """Lay out the heads' warm-up and the trainer's stages.

        The warm-up may be all of the run.

        Raises:
            ConfigError: the stages with a fixed length fill the whole run, so that the last one would never start.
            PluginError: these are no stages, one other than the last has no length, or one has a negative length.
        """
        stages = checked_stages(stages, trainer_name)
        if not stages or any(stage.steps is None for stage in stages[:-1]):
            raise PluginError(f"{trainer_name}: every stage but the last needs a number of steps")
        if negative := [stage.name for stage in stages if stage.steps is not None and stage.steps < 0]:
            raise PluginError(f"{trainer_name}: stage {negative[0]!r} has a negative number of steps")
        if stages[-1].until is not None:
            raise PluginError(
                f"{trainer_name}: the last stage ends with the run, not by a metric; train.early_stopping is for that"
            )
        if warmup_steps:
            warmup = Stage(name=HEAD_WARMUP, steps=warmup_steps, frozen=frozenset({"model"}))
            # a run of nothing else: a single stage that follows is left out, several are not
            stages = [warmup] if warmup_steps == total_steps and len(stages) == 1 else [warmup, *stages]
        ends, end = [], 0
        for stage in stages:
            if end >= total_steps:
                before = ", ".join(f"{other.name!r} {other.steps}" for other in stages[: len(ends)])
                raise ConfigError(
                    f"train.max_steps: the run has {total_steps} steps, which end before stage {stage.name!r}: {before}; make "
                    f"the run longer or the stages before it shorter"
                )
            end = total_steps if stage.steps is None else min(total_steps, end + stage.steps)
            ends.append(end)
        if ends[-1] < total_steps:
            stages = [*stages[:-1], evolve(stages[-1], steps=None)]
            ends[-1] = total_steps
        return cls(stages=tuple(stages), ends=tuple(ends))

    def index(self, step: int) -> int:
        """Return the index of an optimizer step's stage; both from 0."""
        return next(number for number, end in enumerate(self.ends) if step < end)

    def at(self, step: int) -> Stage:
        """Return the stage of an optimizer step, from 0."""
        return self.stages[self.index(step)]

    def ended(self, step: int) -> StagePlan:
        """End the current stage before this step; the next ones start earlier."""
        current = self.index(step - 1)
        sooner = self.ends[current] - step
        moved = [end - sooner for end in self.ends[current:-1]]
        return evolve(self, ends=(*self.ends[:current], *moved, self.ends[-1]))


@frozen(kw_only=True, eq=False)
class StepData:
    """Everything that is known of an optimizer step before it is computed.

    Args:
        batch: all rows of it, on the CPU.
        stage: the stage that it belongs to.
        epoch: of the stage's documents, from 0.
        epoch_steps: steps in every epoch of them.
    """

    batch: Batch
    stage: Stage
    epoch: int
    epoch_steps: int


class Prefetcher(Generic[T]):
    """Background thread that prepares the next steps' data during a step.

    What a step gets is decided as without it. An error is raised where its step is asked for, and not before.

    Args:
        make: is given an optimizer step, from 0; called by one thread only.
        stop: the step after the last one.
        depth: how many steps are made ahead.
    """

    def __init__(self, make: Callable[[int], T], stop: int, *, depth: int = 2) -> None:
        self._make = make
        self._stop = stop
        self._depth = depth
        self._ahead: deque[tuple[int, Future[T]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wmtp-batches")

    def get(self, step: int) -> T:
        """Return a step's data.

        It is ready where the step before it was asked for last.
        """
        if not self._ahead or self._ahead[0][0] != step:
            self.forget()
            self._ahead.append((step, self._thread.submit(self._make, step)))
        while len(self._ahead) <= self._depth and (following := self._ahead[-1][0] + 1) < self._stop:
            self._ahead.append((following, self._thread.submit(self._make, following)))
        return self._ahead.popleft()[1].result()

    def close(self) -> None:
        """Stop making anything."""
        self.forget()
        self._thread.shutdown()

    def forget(self) -> None:
        """Drop what was prefetched; it is made again on demand."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()


class StageBatches:
    """Source of a run's batches.

    Each stage may select and order documents itself.

    Args:
        plan: stages of the run, and where they end; `end_stage` and a resume change it.
        by_stage: one a stage; stages that share one continue in its order.
    """

    def __init__(self, plan: StagePlan, by_stage: Sequence[StepBatches]) -> None:
        self.plan = plan
        self._by_stage = by_stage
        self._pin = False
        self._ahead: Prefetcher[StepData] | None = None

    @classmethod
    def make(
        cls, plan: StagePlan, trainer: Trainer, dataset: TokenDataset, config: TrainDataConfig, *, seed: int, trainer_name: str
    ) -> StageBatches:
        """Ask the trainer for the documents of each stage.

        Raises:
            ConfigError: documents that must be together have no room in a batch.
            PluginError: the trainer returned something else than a number for each piece, or leaves nothing to learn from.
        """
        made: dict[bytes | None, StepBatches] = {}
        by_stage = []
        for stage in plan.stages:
            groups = checked_groups(trainer, trainer_name, dataset, stage)
            key = None if groups is None else groups.tobytes()
            if key not in made:
                made[key] = StepBatches(dataset, config, seed=seed, groups=groups)
            by_stage.append(made[key])
        return cls(plan, by_stage)

    @property
    def fingerprint(self) -> str:
        """See `StepBatches.fingerprint`."""
        return self._by_stage[0].fingerprint

    @property
    def followed(self) -> Batch:
        """First batch of the documents that the last stage learns from."""
        return self._by_stage[-1].batch(0)

    def open(self, *, pin: bool) -> None:
        """Start to prefetch batches.

        With ``pin`` they are in page-locked memory, from which a copy to a GPU does not wait.
        """
        self._pin = pin
        self._ahead = Prefetcher(self.data, self.plan.ends[-1])

    def step(self, step: int) -> StepData:
        """Return the data of a step, from 0; prefetched after `open`."""
        return self.data(step) if self._ahead is None else self._ahead.get(step)

    def data(self, step: int) -> StepData:
        """Make the data of an optimizer step, from 0."""
        batches, index = self.locate(step)
        batch = batches.batch(index)
        return StepData(
            batch=batch.pinned() if self._pin else batch,
            stage=self.plan.at(step),
            epoch=batches.locate(index)[0],
            epoch_steps=batches.steps_per_epoch,
        )

    def locate(self, step: int) -> tuple[StepBatches, int]:
        """Find the batches of a step, from 0, and its index there."""
        current = self.plan.index(step)
        batches = self._by_stage[current]
        starts = (0, *self.plan.ends)
        before = sum(self.plan.ends[number] - starts[number] for number in range(current) if self._by_stage[number] is batches)
        return batches, before + step - starts[current]

    def end_stage(self, step: int) -> None:
        """End the current stage before ``step``; later stages start earlier."""
        self.plan = self.plan.ended(step)
        if self._ahead is not None:
            self._ahead.forget()

    def close(self) -> None:
        """Stop making batches ahead."""
        if self._ahead is not None:
            self._ahead.close()


def apply_stage(stage: Stage, model: MTPModel, modules: Mapping[str, nn.Module], trainer_name: str) -> None:
    """Set ``requires_grad`` for this stage's parameters.

    Raises:
        PluginError: the stage freezes something that does not exist, or everything.
    """
    parts: dict[str, nn.Module] = {"model": model.base, "heads": model.extra_heads, **modules}
    if unknown := stage.frozen - parts.keys():
        raise PluginError(
            f"{trainer_name}: stage {stage.name!r} freezes {', '.join(map(repr, sorted(unknown)))}; there is {', '.join(parts)}"
        )
    fixed = {id(parameter) for parameter in model.fixed_parameters()}
    for name, part in parts.items():
        for parameter in part.parameters():
            learns = name not in stage.frozen and id(parameter) not in fixed
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None
    if not any(parameter.requires_grad for part in parts.values() for parameter in part.parameters()):
        raise PluginError(f"{trainer_name}: stage {stage.name!r} freezes everything, so nothing can learn")

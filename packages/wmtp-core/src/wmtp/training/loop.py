"""Training loop: the only one, and the same for every algorithm."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from attrs import define, evolve, field, frozen
from torch import nn

from wmtp.data.batch import PADDING, Batch
from wmtp.distributed.ranks import Ranks
from wmtp.errors import PluginError
from wmtp.loss.weights import BAD_WEIGHTS, NO_WEIGHT
from wmtp.models.fp8 import products_in_bf16
from wmtp.optim.update import clip_gradients, gradient_norm, learning_rate_factor
from wmtp.runs.files import DOCUMENTS_FILE
from wmtp.trainers.base import Stage
from wmtp.trainers.declarations import checked_state
from wmtp.training.best import Best
from wmtp.training.checkpointing import RunCheckpoints, check_resumed, random_state, set_random_state
from wmtp.training.document_losses import DocumentLosses
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.evaluate import evaluate
from wmtp.training.interrupt import Interrupt, catch_signals
from wmtp.training.stages import StageBatches, apply_stage
from wmtp.training.step import StepLoss
from wmtp.training.telemetry import PendingStep, Recorder, StepLog, finite, peak_memory, send_numbers
from wmtp.training.trainer_modules import UntrainedModules

if TYPE_CHECKING:
    from wmtp.checkpoints.local import Checkpoint
    from wmtp.checkpoints.remote import CheckpointUpload
    from wmtp.config.schema import CheckpointConfig, ScheduleConfig, TrainConfig
    from wmtp.tracking import Tracker

__all__ = ["Fit", "FitResult"]

logger = logging.getLogger("wmtp")

#: so many steps without weight at the start of a run are the trainer's fault, not the data's
_ALL_SKIPPED: Final = 100


@frozen(kw_only=True)
class FitResult:
    """Outcome of the loop.

    Args:
        status: all steps done, stopped early, or interrupted by a signal.
        steps: optimizer steps done, over all resumes.
        metrics: the last value of every metric.
        checkpoint: the newest checkpoint, if there is any.
        signal: the name of the signal that interrupted it.
    """

    status: Literal["finished", "stopped", "interrupted"]
    steps: int
    metrics: Mapping[str, float]
    checkpoint: Path | None
    signal: str | None = None


@define(kw_only=True, eq=False)
class Fit:
    """Everything that one run's loop works with.

    Metrics are read from the device one step late, so that the device never waits for Python. What depends on them (a log
    line, a checkpoint, an evaluation, early stopping) reads them first.
    """

    step_loss: StepLoss
    modules: Mapping[str, nn.Module]
    batches: StageBatches
    eval_batches: Sequence[Batch]
    eval_data: str | None = None
    optimizer: torch.optim.Optimizer
    schedule: ScheduleConfig
    train: TrainConfig
    checkpoints: CheckpointConfig
    checkpoint_dir: Path
    metrics_path: Path
    recorder: Recorder
    tracker: Tracker
    total_steps: int
    resumed: Checkpoint | None = None
    upload: CheckpointUpload | None = None

    _ranks: Ranks = field(init=False)
    _stored: RunCheckpoints = field(init=False)
    _step: int = field(default=0, init=False)
    _last: dict[str, float] = field(factory=dict, init=False)
    _pending: PendingStep | None = field(default=None, init=False)
    _early_stopping: EarlyStopping = field(init=False)
    _best: Best = field(init=False)
    _is_best: bool = field(default=False, init=False)
    _stops: bool = field(default=False, init=False)
    _skipped: int = field(default=0, init=False)
    _checked_state: bool = field(default=False, init=False)
    _stage: Stage | None = field(default=None, init=False)
    _untrained: UntrainedModules = field(factory=lambda: UntrainedModules({}, Stage(), ""), init=False)
    _stage_stopping: EarlyStopping = field(factory=lambda: EarlyStopping(None), init=False)
    _resumed_stage: Mapping[str, Any] | None = field(default=None, init=False)
    _log: StepLog | None = field(default=None, init=False)

    def run(self) -> FitResult:
        """Train from the start, or from the checkpoint, to the end.

        Raises:
            ConfigError: the training data is not that of the checkpoint.
            WMTPError: the loss or the gradient became NaN or infinite, or the disk is full.
            PluginError: the trainer breaks its contract.
        """
        self._ranks = self.step_loss.ranks
        self._stored = RunCheckpoints(
            folder=self.checkpoint_dir,
            keep_last=self.checkpoints.keep_last,
            model=self.step_loss.model,
            modules=self.modules,
            optimizer=self.optimizer,
            ranks=self._ranks,
            master_weights=self.step_loss.master_weights,
            upload=self.upload,
        )
        self._early_stopping = EarlyStopping(self.train.early_stopping)
        self._best = Best(self.checkpoints, self.train)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if self.resumed is not None:
            self._restore(self.resumed)
        self._ranks.main_only(self._open_files)
        try:
            self.batches.open(pin=self.step_loss.device.type == "cuda")
            self.step_loss.model.eval()  # the layers' eval mode: no dropout, so that one step has one value
            with catch_signals() as interrupt:
                if self.train.eval_start and self._step == 0:
                    self._evaluate_start()
                status = self._steps(interrupt)
            signal = interrupt.agreed(self._ranks)
            if signal is not None:  # it may have come in the very last step
                status = "interrupted"
            if self.checkpoints.save_final or status == "interrupted":
                self._save()
            self._ranks.pause()
        finally:
            self.batches.close()
            if self._log is not None:
                self._log.close()
            self.recorder.close()
        return FitResult(status=status, steps=self._step, metrics=self._last, checkpoint=self._stored.newest(), signal=signal)

    def _open_files(self) -> None:
        self.recorder.open(self.metrics_path.parent, self._step)
        self._log = StepLog(self.metrics_path, self.tracker, start=self._step, total=self.total_steps)

    def _evaluate_start(self) -> None:
        """Evaluate and log before the first step; never the best step."""
        values = self._evaluate()
        if self._log is not None and values:
            self._log.write(0, values, finite(values), shown=True)

    def _evaluate(self) -> dict[str, float]:
        if not self.eval_batches:
            return {}
        step_loss = self.step_loss
        documents = DocumentLosses(self.eval_batches, step_loss.model.horizon, step_loss.device)
        with products_in_bf16(step_loss.model):
            found = evaluate(step_loss.model, self.eval_batches, step_loss.device, step_loss.autocast, self._ranks, documents)
        self._ranks.main_only(lambda: documents.write(self.metrics_path.parent / DOCUMENTS_FILE))
        return found

    def _steps(self, interrupt: Interrupt) -> Literal["finished", "stopped", "interrupted"]:
        if self._early_stopping.exhausted:
            return "stopped"
        while self._step < self.total_steps:
            if self._ranks.any(interrupt.requested is not None):
                self._read_pending()
                return "interrupted"
            self._optimizer_step()
            if not self._checked_state:  # before hours are spent on what cannot be saved
                checked_state(self.step_loss.trainer, self.step_loss.trainer_name)
                interrupt.warn_of_others()
                self._checked_state = True
            self._ranks.tick(f"step {self._step}")
            last = self._step == self.total_steps
            evaluates = bool(self.eval_batches) and (
                last or (self.train.eval_interval is not None and self._step % self.train.eval_interval == 0)
            )
            saves = self.checkpoints.save_interval is not None and self._step % self.checkpoints.save_interval == 0
            if not (evaluates or saves or last or self.train.early_stopping):
                continue
            self._read_pending(evaluates=evaluates)
            if saves or self._is_best:
                self._save()
            if self._stops:
                logger.info("stopped early at step %d", self._step)
                return "stopped"
        return "finished"

    def _enter(self, stage: Stage) -> None:
        """Set up the next step's stage, if it is a new one."""
        if stage is self._stage:
            return
        if len(self.batches.plan.stages) > 1:
            logger.info("stage %s from step %d", stage.name, self._step)
        model, sharding = self.step_loss.model, self.step_loss.sharding
        with nullcontext() if sharding is None else sharding.other_parameters_learn(model):
            apply_stage(stage, model, self.modules, self.step_loss.trainer_name)
        self._stage = stage
        self._untrained.end()
        self._untrained = UntrainedModules(self.modules, stage, self.step_loss.trainer_name)
        self._stage_stopping = EarlyStopping(stage.until, f"stage {stage.name!r} of {self.step_loss.trainer_name}")
        if self._resumed_stage is not None and self._resumed_stage["name"] == stage.name:
            self._stage_stopping.load_state_dict(self._resumed_stage["stopping"])
        self._resumed_stage = None

    def _watch(self, pending: PendingStep, numbers: Mapping[str, float]) -> None:
        """End the stage of a step early, if its numbers say so.

        The step after it is always the stage's too: it may have been under way when the numbers were read. So where a stage
        ends does not depend on what else made the loop read them sooner.
        """
        plan = self.batches.plan
        current = plan.index(pending.step - 1)
        stage, end = plan.stages[current], pending.step + 1
        if stage is not self._stage or stage.until is None:
            return
        if self._ranks.any(self._stage_stopping.should_stop(numbers)) and end < plan.ends[current]:
            logger.info("stage %s ends early, at step %d", stage.name, end)
            self.batches.end_stage(end)

    def _measures_accuracy(self, step: int) -> bool:
        """Tell whether accuracy is due after ``step`` steps.

        It is in the first logged step of each interval, and in the last.
        """
        logged, every = self.train.log_interval, self.train.accuracy_interval
        return every > 0 and (step == self.total_steps or (step % logged == 0 and step % every < logged))

    def _optimizer_step(self) -> None:
        began = time.monotonic()
        data = self.batches.step(self._step)
        batch, stage = data.batch, data.stage
        self._enter(stage)
        factor = learning_rate_factor(self.schedule, self._step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        recording = self.recorder.recording(self._step, batch, epoch=data.epoch, epoch_steps=data.epoch_steps)
        accuracy = self._measures_accuracy(self._step + 1)
        output = self.step_loss(
            batch, self._step, stage, histogram=recording.weights, tokens=bool(recording.documents), accuracy=accuracy
        )
        learned = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not learned:
            raise PluginError(
                f"{self.step_loss.trainer_name}: stage {stage.name!r}: no trainable parameter received a gradient"
            )
        if self._untrained.modules:
            self._untrained.after_backward(last=self._step + 1 == self.total_steps)
        norm = gradient_norm(learned)
        if self.train.max_grad_norm:
            clip_gradients(self.optimizer, learned, self.train.max_grad_norm, norm)
        # on their way before the optimizer's work is given to the device, and read a step later
        numbers = send_numbers(output, norm)
        # the numbers of the step before this one, now that the device has new work
        self._read_pending()
        if output.without_weight:
            self._skip()
        else:
            self.optimizer.step()
        self._step += 1
        tokens = int((batch.document != PADDING).sum())
        # the device may still be busy with this step, but then it was with the one before when this one began
        rate = tokens / max(time.monotonic() - began, 1e-9)
        facts = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "epoch": float(data.epoch),
            "tokens": float(tokens),
            "tokens_per_second": rate,
            "stage": stage.name,
        }
        if self._skipped:
            facts["steps_without_weight"] = float(self._skipped)
        self._pending = PendingStep(
            step=self._step, batch=batch, output=output, numbers=numbers, facts=facts, recording=recording
        )

    def _skip(self) -> None:
        """Count a step in which nothing has weight.

        It changes neither the model nor the optimizer's state.

        Raises:
            PluginError: so far there was no other.
        """
        self._skipped += 1
        name = self.step_loss.trainer_name
        if self._skipped > self._step and self._skipped in (_ALL_SKIPPED, self.total_steps):
            raise PluginError(f"{name}: {BAD_WEIGHTS[NO_WEIGHT]} (in all of the first {self._skipped} steps)")
        if self._skipped == 1:
            logger.warning("%s: %s; step %d is skipped", name, BAD_WEIGHTS[NO_WEIGHT], self._step + 1)

    def _read_pending(self, *, evaluates: bool = False) -> None:
        """Read, check and log the step still on the device.

        Also evaluates, if asked.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        values = pending.read(self.step_loss.trainer_name, self._stored.newest)
        self.recorder.write(pending.step, str(pending.facts["stage"]), pending.batch, pending.recording, pending.output)
        self._watch(pending, finite(values))
        if evaluates:
            values |= self._evaluate()
            self._judge(pending.step, finite(values))
        # every step is judged, however few are logged
        if self.train.early_stopping is not None:
            self._stops = self._ranks.any(self._early_stopping.should_stop(finite(values)))
        last = self._stops or pending.step == self.total_steps
        if not (pending.step % self.train.log_interval == 0 or evaluates or last):
            return
        values |= {"peak_memory_gib": self._ranks.max(peak_memory(self.step_loss.device))}
        numbers = finite(values)
        self._last |= numbers
        if self._log is not None:
            self._log.write(pending.step, values, numbers, shown=evaluates)

    def _judge(self, step: int, numbers: Mapping[str, float]) -> None:
        """Remember a step that measures best, whose checkpoint is then kept."""
        value = self._ranks.main_only(lambda: self._best.better(numbers))
        self._is_best = value is not None
        if value is not None:
            self._best.take(step, value)

    def take_best(self) -> None:
        """Load the best step's weights, where the run has stopped early."""
        best = self._best
        if best.step is None or best.step == self._step:
            return
        checkpoint = next((one for one in self._stored.saved() if one.step == best.step), None)
        if checkpoint is None:
            logger.warning("model/ is that of the last step, %d: the checkpoint of the best is gone (%s)", self._step, best)
            return
        self._stored.load_modules(self._stored.load(checkpoint))
        logger.info("model/ is the best, not the last of %d steps: %s", self._step, best)

    def track(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell the tracker of what was measured after the loop."""
        if self._log is not None:
            self._log.track(step, numbers)

    def _save(self) -> None:
        """Write a checkpoint of the current step, unless there is one."""
        is_best, self._is_best = self._is_best, False
        saved = self._stored.saved()
        if saved and saved[-1].step == self._step:
            return
        self._read_pending()
        state = {
            "data": self.batches.fingerprint,
            "eval_data": self.eval_data,
            "trainer": checked_state(self.step_loss.trainer, self.step_loss.trainer_name),
            "early_stopping": self._early_stopping.state_dict(),
            "best": self._best.state_dict(),
            "stage_ends": list(self.batches.plan.ends),
            "stage": {"name": self._stage.name if self._stage else None, "stopping": self._stage_stopping.state_dict()},
            "last_metrics": dict(self._last),
            "skipped": self._skipped,
            "random": random_state(),
        }
        self._stored.write(self._step, state, best=self._best.step, is_best=is_best)
        if self._log is not None:
            self._log.saved(self._step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = self._stored.load(checkpoint)
        check_resumed(
            checkpoint,
            state,
            data=self.batches.fingerprint,
            eval_data=self.eval_data,
            base=self._stored.base,
            train=self.train,
            total_steps=self.total_steps,
        )
        self._step = checkpoint.step
        self._skipped = state.get("skipped", 0)
        self._stored.load_modules(state)
        self.step_loss.trainer.load_state_dict(state["trainer"])
        self._early_stopping.load_state_dict(state["early_stopping"])
        self._best.load_state_dict(state["best"])
        self._stored.resume(checkpoint, self._best.step)
        plan, ends = self.batches.plan, state["stage_ends"]
        # The last stage ends with the run, which may be longer now: so long that a warm-up that was all of it has a successor.
        if len(ends) == len(plan.ends):
            self.batches.plan = evolve(plan, ends=(*ends[:-1], self.total_steps))
        self._resumed_stage = state["stage"]
        self._last = dict(state["last_metrics"])
        set_random_state(state["random"])
        logger.info("resuming from %s", checkpoint.path)

"""The training loop: the only one, and the same for every algorithm."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import define, evolve, field, frozen
from torch import nn

from wmtp.data.batch import PADDING, Batch
from wmtp.distributed.ranks import Ranks
from wmtp.errors import ConfigError, PluginError, WMTPError
from wmtp.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.evaluate import evaluate
from wmtp.training.gradients import clip_gradients, gradient_norm
from wmtp.training.interrupt import Interrupt, catch_signals
from wmtp.training.metrics import StepFile
from wmtp.training.prefetch import Prefetcher
from wmtp.training.progress import Progress
from wmtp.training.readback import Readback
from wmtp.training.schedule import learning_rate_factor
from wmtp.training.stages import StageBatches, StagePlan, apply_stage
from wmtp.training.step import StepLoss, StepOutput
from wmtp.training.trainer import Stage
from wmtp.training.weights import BAD_WEIGHTS

if TYPE_CHECKING:
    from wmtp.config.schema import CheckpointConfig, ScheduleConfig, TrainConfig
    from wmtp.tracking import Tracker
    from wmtp.training.recording import Recorder, Recording
    from wmtp.training.remote_checkpoints import CheckpointUpload

__all__ = ["Fit", "FitResult"]

logger = logging.getLogger("wmtp")

# what is read with the metrics and is none: names that no metric of a trainer has
_LOSS, _BAD_WEIGHTS = "\0loss", "\0bad weights"


@frozen(kw_only=True)
class FitResult:
    """How the loop ended.

    Args:
        status: all steps done, stopped early, or interrupted by a signal.
        steps: optimizer steps done, over all resumes.
        metrics: the last value of every metric.
        checkpoint: the newest checkpoint, if there is any.
    """

    status: Literal["finished", "stopped", "interrupted"]
    steps: int
    metrics: Mapping[str, float]
    checkpoint: Path | None


@frozen(kw_only=True, eq=False)
class _Pending:
    """A step whose numbers are still on the device."""

    step: int
    batch: Batch
    output: StepOutput
    numbers: Readback
    facts: Mapping[str, float | str]
    recording: Recording


@define(kw_only=True, eq=False)
class Fit:
    """Everything that one run's loop works with.

    Metrics are read from the device one step late, so that the device never waits for Python. What depends on them (a log
    line, a checkpoint, an evaluation, early stopping) reads them first.
    """

    step_loss: StepLoss
    modules: Mapping[str, nn.Module]
    plan: StagePlan
    batches: StageBatches
    eval_batches: Sequence[Batch]
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
    _step: int = field(default=0, init=False)
    _last: dict[str, float] = field(factory=dict, init=False)
    _pending: _Pending | None = field(default=None, init=False)
    _early_stopping: EarlyStopping = field(init=False)
    _ahead: Prefetcher = field(init=False)
    _stage: Stage | None = field(default=None, init=False)
    _stage_stopping: EarlyStopping = field(factory=lambda: EarlyStopping(None), init=False)
    _resumed_stage: Mapping[str, Any] | None = field(default=None, init=False)
    _metrics_file: StepFile | None = field(default=None, init=False)
    _progress: Progress | None = field(default=None, init=False)
    _tracker_failed: bool = field(default=False, init=False)

    def run(self) -> FitResult:
        """Train from the start, or from the checkpoint, to the end.

        Raises:
            ConfigError: the training data is not that of the checkpoint.
            WMTPError: the loss or the gradient became NaN or infinite, or the disk is full.
            PluginError: the trainer breaks its contract.
        """
        self._ranks = self.step_loss.ranks
        self._early_stopping = EarlyStopping(self.train.early_stopping)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if self.resumed is not None:
            self._restore(self.resumed)
        self._ranks.on_main(self._open_metrics)
        self._ahead = Prefetcher(self._make_batch, self.total_steps, pin=self.step_loss.device.type == "cuda")
        self.step_loss.model.eval()  # the layers' eval mode: no dropout, so that one step has one value
        try:
            with catch_signals() as interrupt:
                status = self._steps(interrupt)
            if self.checkpoints.save_final or status == "interrupted":
                self._save()
            self._ranks.pause()
        finally:
            self._ahead.close()
            if self._progress is not None:
                self._progress.close()
            if self._metrics_file is not None:
                self._metrics_file.close()
            self.recorder.close()
        newest = self._saved()
        return FitResult(status=status, steps=self._step, metrics=self._last, checkpoint=newest[-1].path if newest else None)

    def _open_metrics(self) -> None:
        self._metrics_file = StepFile(self.metrics_path, self._step)
        self.recorder.open(self.metrics_path.parent, self._step)
        self._progress = Progress(self.total_steps, self._step)

    def _saved(self) -> list[Checkpoint]:
        """The checkpoints that rank 0 sees."""
        return self._ranks.on_main(lambda: list_checkpoints(self.checkpoint_dir))

    def _steps(self, interrupt: Interrupt) -> Literal["finished", "stopped", "interrupted"]:
        if self._early_stopping.exhausted:
            return "stopped"
        while self._step < self.total_steps:
            if self._ranks.any(interrupt.requested is not None):
                self._read_pending()
                return "interrupted"
            self._enter(self.plan.at(self._step))
            self._optimizer_step()
            self._ranks.tick(f"step {self._step}")
            last = self._step == self.total_steps
            evaluates = bool(self.eval_batches) and (
                last or (self.train.eval_interval is not None and self._step % self.train.eval_interval == 0)
            )
            saves = self.checkpoints.save_interval is not None and self._step % self.checkpoints.save_interval == 0
            if not (evaluates or saves or last or self.train.early_stopping):
                continue
            measured = self._read_pending(evaluates=evaluates)
            stops = self._ranks.any(self._early_stopping.should_stop(measured))
            if saves:
                self._save()
            if stops:
                logger.info("stopped early at step %d", self._step)
                return "stopped"
        return "finished"

    def _enter(self, stage: Stage) -> None:
        """Let learn what the stage of the next step lets learn, if it is another one than before."""
        if stage is self._stage:
            return
        if len(self.plan.stages) > 1:
            logger.info("stage %s from step %d", stage.name, self._step)
        apply_stage(stage, self.step_loss.model, self.modules, self.step_loss.trainer_name)
        self._stage = stage
        self._stage_stopping = EarlyStopping(stage.until, f"stage {stage.name!r} of {self.step_loss.trainer_name}")
        if self._resumed_stage is not None and self._resumed_stage["name"] == stage.name:
            self._stage_stopping.load_state_dict(self._resumed_stage["stopping"])
        self._resumed_stage = None

    def _watch(self, pending: _Pending, numbers: Mapping[str, float]) -> None:
        """End the stage of a step early, if its numbers say so.

        The step after it is always the stage's too: it may have been under way when the numbers were read. So where a stage
        ends does not depend on what else made the loop read them sooner.
        """
        current = self.plan.index(pending.step - 1)
        stage, end = self.plan.stages[current], pending.step + 1
        if stage is not self._stage or stage.until is None:
            return
        if self._ranks.any(self._stage_stopping.should_stop(numbers)) and end < self.plan.ends[current]:
            logger.info("stage %s ends early, at step %d", stage.name, end)
            self.plan = self.plan.ended(end)
            self._ahead.forget()  # batches of steps that are another stage's now

    def _make_batch(self, step: int) -> Batch:
        batches, index = self.batches.at(self.plan, step)
        return batches.batch(index)

    def _optimizer_step(self) -> None:
        began = time.monotonic()
        stage = self.plan.at(self._step)
        batch = self._ahead.batch(self._step)
        factor = learning_rate_factor(self.schedule, self._step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        batches, index = self.batches.at(self.plan, self._step)
        epoch, _ = batches.locate(index)
        recording = self.recorder.recording(self._step, batch, epoch=epoch, epoch_steps=batches.steps_per_epoch)
        output = self.step_loss(batch, self._step, stage, histogram=recording.weights, tokens=bool(recording.documents))
        learned = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not learned:
            raise PluginError(f"{self.step_loss.trainer_name}: stage {stage.name!r}: the loss reaches no parameter that learns")
        norm = gradient_norm(learned)
        if self.train.max_grad_norm:
            clip_gradients(learned, self.train.max_grad_norm, norm)
        # on their way before the optimizer's work is given to the device, and read a step later
        numbers = Readback({**output.metrics, "gradient_norm": norm, _LOSS: output.loss, _BAD_WEIGHTS: output.bad_weights})
        # the numbers of the step before this one, now that the device has new work
        self._read_pending()
        self.optimizer.step()
        self._step += 1
        tokens = int((batch.document != PADDING).sum())
        # the device may still be busy with this step, but then it was with the one before when this one began
        rate = tokens / max(time.monotonic() - began, 1e-9)
        facts = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "epoch": float(epoch),
            "tokens": float(tokens),
            "tokens_per_second": rate,
            "stage": stage.name,
        }
        self._pending = _Pending(step=self._step, batch=batch, output=output, numbers=numbers, facts=facts, recording=recording)

    def _read_pending(self, *, evaluates: bool = False) -> dict[str, float]:
        """Read, check and log the step whose numbers are still on the device; measure too if asked."""
        pending, self._pending = self._pending, None
        if pending is None:
            return {}
        measured = pending.numbers.read()
        self._check(pending, measured)
        self.recorder.write(pending.step, str(pending.facts["stage"]), pending.batch, pending.recording, pending.output)
        metrics = {name: value for name, value in measured.items() if name not in (_LOSS, _BAD_WEIGHTS)}
        values: dict[str, float | str] = {name: self._number(name, value) for name, value in metrics.items()}
        values |= dict(pending.facts)
        self._watch(pending, _finite(values))
        logs = pending.step % self.train.log_interval == 0 or evaluates or pending.step == self.total_steps
        if logs:
            values |= {"peak_memory_gib": self._ranks.max(_peak_memory(self.step_loss.device))}
        if evaluates:
            values |= evaluate(
                self.step_loss.model, self.eval_batches, self.step_loss.device, self.step_loss.autocast, self._ranks
            )
        if not logs:
            return {}
        numbers = _finite(values)
        self._last |= numbers
        if self._ranks.is_main:
            self._write(pending.step, values, numbers, evaluates=evaluates)
        return numbers

    def _write(self, step: int, values: Mapping[str, float | str], numbers: Mapping[str, float], *, evaluates: bool) -> None:
        assert self._metrics_file is not None
        assert self._progress is not None
        self._metrics_file.write(step, values)
        self.track(step, numbers)
        self._progress.show(step, numbers, always=evaluates)

    def _number(self, name: str, value: torch.Tensor | float) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise PluginError(
                f"{self.step_loss.trainer_name}: the metric {name!r} is {shown}; a metric is one number"
            ) from error

    def track(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell the tracker. Its mistakes never end a run: ``metrics.jsonl`` has everything."""
        self._tell(lambda: self.tracker.log(step, numbers))

    def _tell(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception as error:
            if not self._tracker_failed:
                logger.warning("the tracker failed at step %d: %s; metrics.jsonl has everything", self._step, error)
            self._tracker_failed = True

    def _check(self, pending: _Pending, measured: Mapping[str, torch.Tensor | float]) -> None:
        if code := int(measured[_BAD_WEIGHTS]):
            raise PluginError(f"{self.step_loss.trainer_name}: {BAD_WEIGHTS[code]} (step {pending.step})")
        loss, norm = float(measured[_LOSS]), float(measured["gradient_norm"])
        if math.isfinite(loss) and math.isfinite(norm):
            return
        ids = list(dict.fromkeys(document.id for document in pending.batch.documents))
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        saved = self._saved()
        good = f"the last good checkpoint is {saved[-1].path}" if saved else "there is no checkpoint yet"
        terms = {name: float(value) for name, value in measured.items() if name.startswith("auxiliary/")}
        terms = {name: value for name, value in terms.items() if not math.isfinite(value)}
        blamed = "".join(f"; {name} of {self.step_loss.trainer_name} is {value}" for name, value in terms.items())
        raise WMTPError(
            f"step {pending.step}: the loss is {loss} and the gradient norm {norm}{blamed}; the batch holds the examples "
            f"{shown}; {good}"
        )

    def _save(self) -> None:
        """Write a checkpoint of the steps done so far, unless there is one."""
        saved = self._saved()
        if saved and saved[-1].step == self._step:
            return
        self._read_pending()
        state = {
            "data": self.batches.fingerprint,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "trainer": self.step_loss.trainer.state_dict(),
            "early_stopping": self._early_stopping.state_dict(),
            "stage_ends": list(self.plan.ends),
            "stage": {"name": self._stage.name if self._stage else None, "stopping": self._stage_stopping.state_dict()},
            "last_metrics": dict(self._last),
            "random": _random_state(),
        }
        self._ranks.on_main(self._prune)  # fewer may be wanted since a resume
        try:
            folder, model = self.checkpoint_dir, self.step_loss.model
            with self._learned_weights():
                saved_now = save_checkpoint(folder, self._step, model, self.optimizer, state, self._ranks)
        except WMTPError as error:
            good = f"; the last good checkpoint is {saved[-1].path}" if saved else ""
            raise WMTPError(f"{error}{good}") from error
        if self.upload is not None:
            self.upload.put(saved_now)
        self._ranks.on_main(self._prune)
        if self._ranks.is_main:
            self._tell(lambda: self.tracker.saved(self._step))

    def _prune(self) -> None:
        needed = self.upload.needed if self.upload is not None else ()
        prune_checkpoints(self.checkpoint_dir, self.checkpoints.keep_last, needed)

    def _learned_weights(self) -> AbstractContextManager[None]:
        """A checkpoint holds the weights as the optimizer has them, so it fits runs in any precision."""
        masters = self.step_loss.master_weights
        return nullcontext() if masters is None else masters.in_place()

    def _restore(self, checkpoint: Checkpoint) -> None:
        with self._learned_weights():
            state = self._ranks.together(lambda: load_checkpoint(checkpoint, self.step_loss.model, self.optimizer))
        if state["data"] != self.batches.fingerprint:
            raise ConfigError(
                f"datasets: the training data is not what it was when {checkpoint.path} was written: a file or the tokenizer "
                f"has changed; bring it back, or start a new run under another --run-name"
            )
        self._step = checkpoint.step
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.step_loss.trainer.load_state_dict(state["trainer"])
        self._early_stopping.load_state_dict(state["early_stopping"])
        self.plan = evolve(self.plan, ends=tuple(state["stage_ends"]))
        self._resumed_stage = state["stage"]
        self._last = dict(state["last_metrics"])
        _set_random_state(state["random"])
        logger.info("goes on from %s", checkpoint.path)


def _finite(values: Mapping[str, float | str]) -> dict[str, float]:
    """The values that are numbers."""
    return {name: float(value) for name, value in values.items() if not isinstance(value, str) and math.isfinite(value)}


def _peak_memory(device: torch.device) -> float:
    """GiB, since the start: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

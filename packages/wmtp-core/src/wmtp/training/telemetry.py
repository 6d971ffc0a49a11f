"""Telemetry of a run, read from the device without waiting.

Numbers come from the device (`Readback`), are checked (`PendingStep`), and go to ``metrics.jsonl``, the tracker and a person
(`StepLog`). What ``wmtp report`` needs besides is chosen and written by `Recorder`.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from attrs import frozen
from torch import Tensor

from wmtp.data.batch import PADDING, Batch
from wmtp.errors import PluginError, WMTPError
from wmtp.json_files import writing
from wmtp.log_lines import in_notebook
from wmtp.loss.weights import BAD_WEIGHTS, NO_WEIGHT
from wmtp.runs.step_file import read_steps
from wmtp.storage.atomic import replace_text
from wmtp.tracking import Tracker
from wmtp.tracking.base import failure
from wmtp.tracking.waiting import name_slow
from wmtp.training.recording import Place, Recording, document_record

if TYPE_CHECKING:
    from wmtp.config.schema import ReportConfig
    from wmtp.tokenizers import Tokenizer
    from wmtp.training.step import StepOutput

__all__ = ["PendingStep", "Progress", "Readback", "Recorder", "StepFile", "StepLog", "finite", "peak_memory", "send_numbers"]

logger = logging.getLogger("wmtp")

# reserved keys read back alongside metrics: no trainer's metric has such a name
_LOSS, _BAD_WEIGHTS = "\0loss", "\0bad weights"

#: how often is recorded by default, in a whole run
_DISTRIBUTIONS: Final = 200
_TEXTS: Final = 16
#: a smaller effective sample, as a share of all predictions, is warned of
_FEW: Final = 0.01
#: seconds between two lines in a log, and between two updates of a cell
_LINE_INTERVAL: Final = 10.0
_CELL_INTERVAL: Final = 0.5


class Readback:
    """Scalars on their way from the device.

    Reading a tensor waits for everything that was given to the device before, the next step's work too. So the copy is asked
    for at once, behind the work that makes the numbers and before any other, and `read` waits for that copy alone.

    Args:
        values: by name. What is no single number comes back as it is.
    """

    def __init__(self, values: Mapping[str, Tensor | float]) -> None:
        self._values = dict(values)
        self._copied: dict[str, int] = {}
        on_device = {n: v.detach() for n, v in values.items() if isinstance(v, Tensor) and v.is_cuda and v.numel() == 1}
        if not on_device:
            return
        together = torch.stack([value.reshape(()).to(torch.float64) for value in on_device.values()])
        self._host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True).copy_(together, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()
        self._copied = {name: place for place, name in enumerate(on_device)}

    def read(self) -> dict[str, Tensor | float]:
        """Return the values, those of the device as numbers."""
        if self._copied:
            self._arrived.synchronize()
            numbers = self._host.tolist()
            return self._values | {name: numbers[place] for name, place in self._copied.items()}
        return self._values


def send_numbers(output: StepOutput, gradient_norm: Tensor) -> Readback:
    """Start copying a step's numbers, before the device gets other work."""
    return Readback({**output.metrics, "gradient_norm": gradient_norm, _LOSS: output.loss, _BAD_WEIGHTS: output.bad_weights})


@frozen(kw_only=True, eq=False)
class PendingStep:
    """A step whose numbers are still on the device.

    Args:
        step: optimizer steps done with it.
        batch: what it learned from.
        output: its loss, and what that was made of.
        numbers: what `send_numbers` gave.
        facts: numbers known without the device.
        recording: what is kept of it for the report.
    """

    step: int
    batch: Batch
    output: StepOutput
    numbers: Readback
    facts: Mapping[str, float | str]
    recording: Recording

    def read(self, trainer_name: str, last_checkpoint: Callable[[], Path | None]) -> dict[str, float | str]:
        """Wait for the numbers, and check them.

        Args:
            trainer_name: what messages call the trainer.
            last_checkpoint: asked where the newest checkpoint is, on every rank alike, if the loss is not finite.

        Returns:
            the metrics and the facts.

        Raises:
            PluginError: weights or metrics break the trainer's contract.
            WMTPError: the loss or the gradient is NaN or infinite.
        """
        measured = self.numbers.read()
        code = int(measured[_BAD_WEIGHTS])
        if code == NO_WEIGHT:  # the step was skipped: it has no loss
            measured = {name: value for name, value in measured.items() if name != "loss"}
        elif code:
            raise PluginError(f"{trainer_name}: {BAD_WEIGHTS[code]} (step {self.step})")
        loss, norm = float(measured[_LOSS]), float(measured["gradient_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise WMTPError(self._blame(loss, norm, measured, trainer_name, last_checkpoint()))
        metrics = {name: value for name, value in measured.items() if name not in (_LOSS, _BAD_WEIGHTS)}
        return {name: _number(name, value, trainer_name) for name, value in metrics.items()} | dict(self.facts)

    def _blame(
        self, loss: float, norm: float, measured: Mapping[str, Tensor | float], trainer_name: str, checkpoint: Path | None
    ) -> str:
        ids = list(dict.fromkeys(document.id for document in self.batch.documents))
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        good = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        terms = {name: float(value) for name, value in measured.items() if name.startswith("auxiliary/")}
        terms = {name: value for name, value in terms.items() if not math.isfinite(value)}
        blamed = "".join(f"; {name} of {trainer_name} is {value}" for name, value in terms.items())
        return (
            f"step {self.step}: the loss is {loss} and the gradient norm {norm}{blamed}; the batch holds the examples "
            f"{shown}; {good}"
        )


def _number(name: str, value: Tensor | float, trainer_name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise PluginError(f"{trainer_name}: the metric {name!r} is {shown}; a metric is one number") from error


def finite(values: Mapping[str, float | str]) -> dict[str, float]:
    """Keep the values that are numbers."""
    return {name: float(value) for name, value in values.items() if not isinstance(value, str) and math.isfinite(value)}


def peak_memory(device: torch.device) -> float:
    """Measure the peak in GiB: of a GPU's allocator, or the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class StepFile:
    """Appends steps to a file of JSON lines.

    Args:
        path: the file.
        resumed_step: lines of later steps, which the interrupted run wrote after its last checkpoint, are taken out: the
            resumed run writes them again.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in read_steps(path) if line["step"] <= resumed_step] if path.exists() else []
        replace_text(path, "".join(_line(record) for record in kept))
        with writing(path):
            self._file = path.open("a")
        self.path = path

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one step.

        Args:
            step: optimizer steps done.
            values: by name; those that are not a number (a head without predictions) are left out.

        Raises:
            WMTPError: the disk is full, or the file cannot be written for another reason.
        """
        try:
            self._file.write(_line({"step": step} | dict(values)))
            self._file.flush()
        except OSError as error:
            raise WMTPError(f"{self.path} cannot be written: {error}") from error

    def close(self) -> None:
        """Close the file; that writes again what a full disk has refused.

        Raises:
            WMTPError: it still cannot be written.
        """
        with writing(self.path):
            self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    known = {name: value for name, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
    return json.dumps(known) + "\n"


class StepLog:
    """Writes the numbers of steps; on rank 0 alone.

    Args:
        path: ``metrics.jsonl``.
        tracker: is told too. Its mistakes never end a run: the file has everything.
        start: optimizer steps done already.
        total: those of the whole job.
    """

    def __init__(self, path: Path, tracker: Tracker, *, start: int, total: int) -> None:
        self._file = StepFile(path, start)
        self._tracker = tracker
        self._progress = Progress(total, start)
        self._tracker_failed = False
        self._waits: tuple[int, float] | None = None
        self._end_watch = name_slow(tracker, lambda: self._waits)
        self._warned_of_few = False

    def write(self, step: int, values: Mapping[str, float | str], numbers: Mapping[str, float], *, shown: bool) -> None:
        """Write a step.

        Args:
            step: optimizer steps done with it.
            values: everything that is known of it.
            numbers: those of the values that are finite numbers.
            shown: whether a person must see it; else only now and then.
        """
        self._file.write(step, values)
        if not self._warned_of_few and numbers.get("weight/ess_share", 1.0) < _FEW:
            logger.warning(
                "step %d: the weights leave an effective sample of %.0f predictions, %.2g %% of all (weight/ess_share): the "
                "model learns from these few; raise the trainer's temperature, or train new heads first "
                "(models.base.heads.warmup_steps)",
                step,
                numbers["weight/ess"],
                100 * numbers["weight/ess_share"],
            )
            self._warned_of_few = True
        self.track(step, numbers)
        self._progress.show(step, numbers, always=shown)

    def track(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell the tracker only."""
        self._tell(step, lambda: self._tracker.log(step, dict(numbers)))

    def saved(self, step: int) -> None:
        """Tell the tracker of a checkpoint."""
        self._tell(step, lambda: self._tracker.saved(step))

    def close(self) -> None:
        """Close bar and file."""
        self._end_watch()
        self._progress.close()
        self._file.close()

    def _tell(self, step: int, tell: Callable[[], None]) -> None:
        self._waits = step, time.monotonic()
        try:
            tell()
        except Exception as error:
            if not self._tracker_failed:
                logger.warning("step %d: %s; metrics.jsonl has everything", step, failure(self._tracker, error))
            self._tracker_failed = True
        finally:
            self._waits = None


class Recorder:
    """Chooses what is recorded, and writes it.

    What is recorded of a step depends on the data and the config alone, so that every process of a job and a resumed run
    choose the same. Texts are recorded from the first and the last step and every ``report.sample_interval`` steps. Some
    documents are followed: they are recorded whenever they come again, too, at most once in an interval.

    Args:
        config: ``[report]``.
        tokenizer: what made the tokens.
        total_steps: of the whole run.
        followed: the first documents of this batch are followed.
    """

    def __init__(self, config: ReportConfig, tokenizer: Tokenizer, *, total_steps: int, followed: Batch) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._total_steps = total_steps
        interval = config.weight_interval
        self._weight_interval = math.ceil(total_steps / _DISTRIBUTIONS) if interval is None else interval
        self._sample_interval = config.sample_interval or math.ceil(total_steps / _TEXTS)
        self._followed: frozenset[tuple[int, int]] = frozenset()
        if config.samples:
            self._followed = frozenset(_key(followed, place.number) for place in self._choose(followed))
        self._files: dict[str, StepFile] = {}

    def open(self, run_dir: Path, resumed_step: int) -> None:
        """Open the files.

        Where this is not called (on every rank but the first) nothing is written.

        Args:
            run_dir: where they are.
            resumed_step: see `StepFile`.

        Raises:
            WMTPError: they cannot be written.
        """
        for name, wanted in (("weights", self._weight_interval), ("samples", self._config.samples)):
            if wanted:
                self._files[name] = StepFile(run_dir / f"{name}.jsonl", resumed_step)

    def recording(self, step: int, batch: Batch, *, epoch: int, epoch_steps: int) -> Recording:
        """Choose what to record of a step.

        Args:
            step: from 0.
            batch: all rows of it, on the CPU.
            epoch: that the step belongs to, from 0.
            epoch_steps: steps in every epoch.
        """
        done = step + 1

        def is_due(interval: int) -> bool:
            return done in (1, self._total_steps) or done % interval == 0

        documents: Sequence[Place] = ()
        if self._config.samples:
            if is_due(self._sample_interval):
                documents = self._choose(batch)
            elif epoch % math.ceil(self._sample_interval / epoch_steps) == 0 and any(
                (document.index, document.start) in self._followed for document in batch.documents
            ):
                documents = self._choose(batch, followed_only=True)
        return Recording(weights=bool(self._weight_interval) and is_due(self._weight_interval), documents=documents)

    def _choose(self, batch: Batch, *, followed_only: bool = False) -> list[Place]:
        """Choose documents of a batch.

        First those that are followed, then the first of each row, the second of each row, and so on.
        """
        found: list[tuple[bool, int, Place]] = []
        for row in range(len(batch.document)):
            numbers = batch.document[row]
            present = [int(number) for number in numbers.unique_consecutive() if number != PADDING]
            for rank, number in enumerate(present):
                inside = (numbers == number).nonzero().squeeze(1)
                start, stop = int(inside[0]), int(inside[-1]) + 1
                stop = min(stop, start + self._config.sample_tokens)
                is_followed = _key(batch, number) in self._followed
                # the first token follows nothing, so nothing predicts it
                if batch.loss_mask[row, start + 1 : stop].any() and (is_followed or not followed_only):
                    found.append((not is_followed, rank, Place(number=number, row=row, start=start, stop=stop)))
        found.sort(key=lambda entry: entry[:2])
        return [place for *_, place in found[: self._config.samples]]

    def write(self, step: int, stage: str, batch: Batch, recording: Recording, output: StepOutput) -> None:
        """Read from the device what was recorded, and write it.

        Args:
            step: optimizer steps done.
            stage: the stage's name.
            batch: all rows, on the CPU.
            recording: what was asked for.
            output: what the step gave.

        Raises:
            WMTPError: the disk is full.
        """
        if output.weight_histogram is not None and (file := self._files.get("weights")):
            file.write(step, {"counts": output.weight_histogram.tolist()})
        if recording.documents and output.tokens is not None and (file := self._files.get("samples")):
            documents = [document_record(batch, place, output.tokens, self._tokenizer) for place in recording.documents]
            mean = None if output.tokens.weights is None else float(output.metrics["weight/mean"])
            file.write(step, {"stage": stage, "mean_weight": mean, "documents": documents})

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def _key(batch: Batch, number: int) -> tuple[int, int]:
    document = batch.documents[number]
    return document.index, document.start


class Progress:
    """Display of a run's progress.

    It shows nothing where the logger ``wmtp`` is set to warnings.

    Args:
        total: optimizer steps of the whole job.
        start: optimizer steps done already.
    """

    def __init__(self, total: int, start: int) -> None:
        self._total = total
        self._shown = start
        self._last = 0.0
        self._bar: Any = None
        self._cell: Any = None
        self._is_quiet = logger.level > logging.INFO
        self._in_notebook = in_notebook() and not self._is_quiet
        if sys.stderr.isatty() and not self._in_notebook and not self._is_quiet:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=sys.stderr)

    def show(self, step: int, metrics: Mapping[str, float], *, always: bool = False) -> None:
        """Show the state after ``step`` steps.

        A log gets a line only now and then, unless ``always``.
        """
        facts = _summary(metrics)
        is_due = always or step == self._total
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(step - self._shown)
            self._shown = step
        elif is_due or time.monotonic() - self._last >= (_CELL_INTERVAL if self._in_notebook else _LINE_INTERVAL):
            self._last = time.monotonic()
            line = f"step {step}/{self._total}  {facts}"
            if self._in_notebook:
                self._update_cell(line)
            else:
                logger.info("%s", line)

    def close(self) -> None:
        """Keep the last display."""
        if self._bar is not None:
            self._bar.close()

    def _update_cell(self, line: str) -> None:
        """Replace the line in the output of the cell that runs."""
        content = {"text/plain": line}
        if self._cell is None:
            self._cell = sys.modules["IPython"].display.display(content, raw=True, display_id=True)
        else:
            self._cell.update(content, raw=True)


def _summary(metrics: Mapping[str, float]) -> str:
    heads = [f"{value:.3f}" for name, value in metrics.items() if name.startswith("loss/head_")]
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    if len(heads) > 1:
        parts.append(f"heads {' '.join(heads)}")
    if "eval/loss" in metrics:
        parts.append(f"eval {metrics['eval/loss']:.4f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)

"""The numbers of one step: on their way from the device, read, and checked."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

from wmtp.errors import PluginError, WMTPError
from wmtp.loss.weights import BAD_WEIGHTS
from wmtp.training.readback import Readback

if TYPE_CHECKING:
    from wmtp.data.batch import Batch
    from wmtp.training.recording import Recording
    from wmtp.training.step import StepOutput

__all__ = ["PendingStep", "finite", "peak_memory", "send_numbers"]

# what is read with the metrics and is none: names that no metric of a trainer has
_LOSS, _BAD_WEIGHTS = "\0loss", "\0bad weights"


def send_numbers(output: StepOutput, gradient_norm: Tensor) -> Readback:
    """Ask the device for a step's numbers, before it is given other work."""
    return Readback({**output.metrics, "gradient_norm": gradient_norm, _LOSS: output.loss, _BAD_WEIGHTS: output.bad_weights})


@frozen(kw_only=True, eq=False)
class PendingStep:
    """A step whose numbers are still on the device.

    Args:
        step: optimizer steps done with it.
        batch: what it learned from.
        output: its loss, and what that was made of.
        numbers: what `send_numbers` gave.
        facts: what is known of it without the device.
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
        if code := int(measured[_BAD_WEIGHTS]):
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
    except (TypeError, ValueError, RuntimeError) as error:
        shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise PluginError(f"{trainer_name}: the metric {name!r} is {shown}; a metric is one number") from error


def finite(values: Mapping[str, float | str]) -> dict[str, float]:
    """The values that are numbers."""
    return {name: float(value) for name, value in values.items() if not isinstance(value, str) and math.isfinite(value)}


def peak_memory(device: torch.device) -> float:
    """GiB, since the start: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

"""What a run writes down for ``wmtp report`` besides its metrics: how weights are distributed, and texts token by token.

``weights.jsonl`` has one object a recorded step: ``counts``, for each head how many predictions had a weight in each of the
`WEIGHT_BINS`. ``samples.jsonl`` has one object a step from which texts are recorded: ``stage``; ``mean_weight``, of the whole
step; and ``documents``, a list of

- ``index``, ``start``, ``id``, ``is_correct``, ``reward``: see `wmtp.data.Document`;
- ``tokens``: the text of each token;
- ``weight`` (null in a stage without weights) and ``loss``: for each head one number a token, the one of that head's
  prediction *of* the token, null where it makes none;
- ``details``: what `Trainer.token_details` gave, by name: one number a token, or for each head one number a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from attrs import frozen
from torch import Tensor

from wmtp.data.batch import PADDING, Batch
from wmtp.runs.step_file import StepFile
from wmtp.runs.weight_bins import BINS_PER_OCTAVE, HALF_BINS, WEIGHT_BINS
from wmtp.tokenizers.texts import token_texts

if TYPE_CHECKING:
    from wmtp.config.schema import ReportConfig
    from wmtp.tokenizers import Tokenizer
    from wmtp.training.step import StepOutput

__all__ = ["Recorder", "Recording", "TokenRecord", "weight_histogram"]

#: how often by default, in a whole run
_DISTRIBUTIONS: Final = 200
_TEXTS: Final = 16


def weight_histogram(weights: Tensor, valid: Tensor) -> Tensor:
    """How many valid predictions of each head have a weight in each of the `WEIGHT_BINS`.

    Args:
        weights: ``[B, S, H]``.
        valid: ``[B, S, H]`` bool.

    Returns:
        ``[H, len(WEIGHT_BINS)]`` int64, on the device of the weights; nothing waits for the device.
    """
    horizon, bins = weights.shape[-1], len(WEIGHT_BINS)
    place = (weights.float().log2() * BINS_PER_OCTAVE).nan_to_num(nan=0.0).round().clamp(-HALF_BINS - 1, HALF_BINS + 1)
    index = torch.where(weights > 0, place.to(torch.int64) + HALF_BINS + 2, 0)
    index += torch.arange(horizon, device=index.device) * bins
    counts = torch.zeros(horizon * bins, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index.flatten(), valid.flatten().to(torch.int64)).view(horizon, bins)


@frozen(kw_only=True, eq=False)
class TokenRecord:
    """What is known of every token of a step. Nothing here has been read from the device yet.

    Args:
        weights: ``[B, S, H]``; None in a stage without weights.
        losses: CE, ``[B, S, H]``.
        valid: ``[B, S, H]`` bool.
        details: ``[B, S]`` or ``[B, S, H]`` each, by name.
    """

    weights: Tensor | None
    losses: Tensor
    valid: Tensor
    details: Mapping[str, Tensor]


@frozen(kw_only=True)
class _Place:
    """A document in a batch: its number there, its row, and its first token and the one after the last that is recorded."""

    number: int
    row: int
    start: int
    stop: int


@frozen(kw_only=True)
class Recording:
    """What is recorded of one step.

    Args:
        weights: whether the distribution of weights is.
        documents: the documents whose tokens are.
    """

    weights: bool
    documents: Sequence[_Place]


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
        """Open the files. Where this is not called (on every rank but the first) nothing is written.

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
        """What to record of a step.

        Args:
            step: from 0.
            batch: all rows of it, on the CPU.
            epoch: that the step belongs to, from 0.
            epoch_steps: steps in every epoch.
        """
        done = step + 1

        def is_due(interval: int) -> bool:
            return done in (1, self._total_steps) or done % interval == 0

        documents: Sequence[_Place] = ()
        if self._config.samples:
            if is_due(self._sample_interval):
                documents = self._choose(batch)
            elif epoch % math.ceil(self._sample_interval / epoch_steps) == 0 and any(
                (document.index, document.start) in self._followed for document in batch.documents
            ):
                documents = self._choose(batch, followed_only=True)
        return Recording(weights=bool(self._weight_interval) and is_due(self._weight_interval), documents=documents)

    def _choose(self, batch: Batch, *, followed_only: bool = False) -> list[_Place]:
        """Documents of a batch: those that are followed, then the first of each row, the second of each row …"""
        found: list[tuple[bool, int, _Place]] = []
        for row in range(len(batch.document)):
            numbers = batch.document[row]
            present = [int(number) for number in numbers.unique_consecutive() if number != PADDING]
            for rank, number in enumerate(present):
                inside = (numbers == number).nonzero().squeeze(1)
                start, stop = int(inside[0]), int(inside[-1]) + 1
                stop = min(stop, start + self._config.sample_tokens)
                is_followed = _key(batch, number) in self._followed
                # the first token follows nothing, so nothing predicts it
                if batch.learn[row, start + 1 : stop].any() and (is_followed or not followed_only):
                    found.append((not is_followed, rank, _Place(number=number, row=row, start=start, stop=stop)))
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
            documents = [self._document(batch, place, output.tokens) for place in recording.documents]
            mean = None if output.tokens.weights is None else float(output.metrics["weight/mean"])
            file.write(step, {"stage": stage, "mean_weight": mean, "documents": documents})

    def _document(self, batch: Batch, place: _Place, record: TokenRecord) -> dict[str, Any]:
        row, inside = place.row, slice(place.start, place.stop)
        document = batch.documents[place.number]
        valid = record.valid[row, inside].cpu()
        learned = batch.learn[row, inside]
        details = {}
        for name, value in record.details.items():
            values = value[row, inside].detach().float().cpu()
            details[name] = _by_target(values, valid) if values.ndim == 2 else _numbers(values, learned)
        return {
            "index": document.index,
            "start": document.start,
            "id": document.id,
            "is_correct": document.is_correct,
            "reward": document.reward,
            "tokens": token_texts(self._tokenizer, batch.input_ids[row, inside].tolist()),
            "weight": None if record.weights is None else _by_target(record.weights[row, inside].cpu(), valid),
            "loss": _by_target(record.losses[row, inside].cpu(), valid),
            "details": details,
        }

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def _key(batch: Batch, number: int) -> tuple[int, int]:
    document = batch.documents[number]
    return document.index, document.start


def _by_target(values: Tensor, valid: Tensor) -> list[list[float | None]]:
    """From predictions ``[L, H]`` to H lists of L numbers: of head k at place j its prediction of token j, made at j − k."""
    length, horizon = values.shape
    return [
        [None] * min(k, length) + _numbers(values[: max(0, length - k), k - 1], valid[: max(0, length - k), k - 1])
        for k in range(1, horizon + 1)
    ]


def _numbers(values: Tensor, known: Tensor) -> list[float | None]:
    """Four digits are enough to look at, and make small files."""
    return [
        float(f"{value:.4g}") if there and math.isfinite(value) else None
        for value, there in zip(values.tolist(), known.tolist(), strict=True)
    ]

"""Checkpoints of one run: written, pruned, uploaded, loaded, and validated on resume."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import define, field
from torch import nn

from wmtp.checkpoints.local import Checkpoint, list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint
from wmtp.errors import ConfigError, WMTPError

if TYPE_CHECKING:
    from wmtp.checkpoints.remote import CheckpointUpload
    from wmtp.config.schema import TrainConfig
    from wmtp.distributed.ranks import Ranks
    from wmtp.models.mtp import MTPModel
    from wmtp.optim.master_weights import MasterWeights

__all__ = ["RunCheckpoints", "check_resumed", "random_state", "set_random_state"]

logger = logging.getLogger("wmtp")


@define(kw_only=True, eq=False)
class RunCheckpoints:
    """Folder of a run's checkpoints.

    It reads from model, modules and optimizer, and puts back into them.

    Args:
        folder: has one folder a step.
        keep_last: so many are kept, besides the best and those whose upload is not done.
        model: as it trains.
        modules: of the trainer, by name.
        optimizer: with its state.
        ranks: the processes of the job.
        master_weights: in fp32, where the model has another precision.
        upload: to ``checkpoints.uri``.
    """

    folder: Path
    keep_last: int
    model: MTPModel
    modules: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    master_weights: MasterWeights | None = None
    upload: CheckpointUpload | None = None

    _best: int | None = field(default=None, init=False)

    @property
    def base(self) -> str | None:
        """Fingerprint of the frozen base model.

        Checkpoints of adapters leave that model out; None where they hold all of it.
        """
        return None if self.model.adapter is None else self.model.adapter.fingerprint

    def saved(self) -> list[Checkpoint]:
        """List the checkpoints that rank 0 sees."""
        return self.ranks.main_only(lambda: list_checkpoints(self.folder))

    def newest(self) -> Path | None:
        """Find the newest checkpoint."""
        saved = self.saved()
        return saved[-1].path if saved else None

    def write(self, step: int, state: Mapping[str, Any], *, best: int | None, is_best: bool) -> None:
        """Write a checkpoint, hand it to the upload, and prune old ones.

        Args:
            step: optimizer steps done.
            state: of loop and trainer.
            best: the step that measures best so far.
            is_best: it is this one.

        Raises:
            WMTPError: it could not be written; the message names the last one that is whole.
        """
        newest = self.newest()  # asked of rank 0 now: an error may be of one process alone
        self.ranks.main_only(self._prune)  # fewer may be wanted since a resume
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        try:
            with self._learned_weights():
                found = save_checkpoint(
                    self.folder, step, self.model, self.optimizer, {**state, "base": self.base, "modules": modules}, self.ranks
                )
        except WMTPError as error:
            good = "" if newest is None else f"; the last good checkpoint is {newest}"
            raise WMTPError(f"{error}{good}") from error
        if self.upload is not None:
            self.upload.put(found, is_best=is_best)
        self._best = best
        self.ranks.main_only(self._prune)

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Load a checkpoint into model and optimizer, and return its state.

        The modules' state is put back by `load_modules`.
        """
        with self._learned_weights():
            return self.ranks.collective(lambda: load_checkpoint(checkpoint, self.model, self.optimizer, self.ranks))

    def load_modules(self, state: Mapping[str, Any]) -> None:
        """Put the trainer's modules back."""
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])

    def resume(self, checkpoint: Checkpoint, best: int | None) -> None:
        """Keep and upload checkpoints as before the interruption.

        Args:
            checkpoint: that the run resumes from.
            best: the step that measured best.
        """
        self._best = best
        self.ranks.main_only(lambda: self._resume_upload(checkpoint, best))

    def _resume_upload(self, checkpoint: Checkpoint, best: int | None) -> None:
        if self.upload is not None:
            self.upload.restore_best(best, self.folder)
            self.upload.put(checkpoint)  # it may have been written by a process that was killed before it was uploaded

    def _prune(self) -> None:
        needed = self.upload.needed if self.upload is not None else set()
        best = set() if self._best is None else {self._best}  # until a better one is whole
        prune_checkpoints(self.folder, self.keep_last, needed | best)

    def _learned_weights(self) -> AbstractContextManager[None]:
        """Put the weights as the optimizer has them into the model.

        So a checkpoint fits runs in any precision.
        """
        return nullcontext() if self.master_weights is None else self.master_weights.in_place()


def check_resumed(
    checkpoint: Checkpoint,
    state: Mapping[str, Any],
    *,
    data: str,
    eval_data: str | None,
    base: str | None,
    train: TrainConfig,
    total_steps: int,
) -> None:
    """Compare a checkpoint's data and model with those of the run.

    Args:
        checkpoint: that the run resumes from.
        state: of it.
        data: fingerprint of the training data.
        eval_data: fingerprint of the evaluation data. Another one changes nothing that is learned, unless it decides when the
            run ends.
        base: fingerprint of the model that checkpoints leave out.
        train: for early stopping.
        total_steps: of the run.

    Raises:
        ConfigError: data or model are others, or the run would be shorter than what is done.
    """
    if state["data"] != data:
        raise ConfigError(
            f"datasets: the training data is not what it was when {checkpoint.path} was written: a file or the tokenizer "
            f"has changed; bring it back, or start a new run under another --run-name"
        )
    if state.get("base") != base:
        raise ConfigError(
            f"models.base: {checkpoint.path} holds an adapter of another model than this: the files of models.base.uri "
            "have changed; bring them back, or start a new run under another --run-name"
        )
    if state.get("eval_data", eval_data) != eval_data:  # earlier versions did not keep it
        what = f"the evaluation data is not what it was when {checkpoint.path} was written"
        stopping = train.early_stopping
        if stopping is not None and stopping.metric.startswith("eval/"):
            raise ConfigError(
                f"datasets: {what}, and train.early_stopping compares {stopping.metric} with what was measured then; bring it "
                f"back, or start a new run under another --run-name"
            )
        logger.warning("datasets: %s; eval/… from step %d on cannot be compared with the values before", what, checkpoint.step)
    if checkpoint.step > total_steps:
        raise ConfigError(
            f"train.max_steps: the run would have {total_steps} steps, and has done {checkpoint.step}; write more"
        )


def random_state() -> dict[str, Any]:
    """Return the states of the global random generators: Python's, numpy's, torch's."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    generator = np.random.get_state(legacy=False)["bit_generator"]
    if generator == "MT19937":
        name, keys, *rest = np.random.get_state()
        state["numpy"] = [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest]
    else:
        logger.warning("numpy's global random numbers come from %s, which a checkpoint does not keep", generator)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "numpy" in state:  # earlier versions did not keep it
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

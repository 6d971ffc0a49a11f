"""TensorBoard tracker, by torch's own writer of event files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wmtp.errors import WMTPError
from wmtp.storage.uris import file_path
from wmtp.tracking.base import RunInfo, Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from wmtp.tracking.config import TensorBoardTracker

__all__ = ["TensorBoard"]


class TensorBoard(Tracker):
    """Writes scalars, the config, and at the end how the run went.

    TensorBoard itself replaces what is beyond the step that a resumed run goes on from: its writer notes that step.
    """

    def __init__(self, config: TensorBoardTracker) -> None:
        self._config = config
        self._writer: SummaryWriter | None = None
        self._folder: Path | None = None

    def start(self, run: RunInfo) -> None:
        """Open an event file; see `Tracker.start`."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise WMTPError(f"tracker 'tensorboard': {error}; install wmtp-core[tensorboard]") from error
        self._folder = run.run_dir.parent / "tensorboard" if self._config.folder is None else file_path(self._config.folder)
        try:
            self._writer = SummaryWriter(str(self._folder / run.name), purge_step=(run.resumed_step or 0) + 1)
        except OSError as error:
            raise WMTPError(f"tracker.folder: {self._folder} cannot be written: {error.strerror}") from error
        for title, values in (("config", run.params), ("tags", run.tags)):
            rows = "".join(f"| `{name}` | `{value}` |\n" for name, value in values.items())
            self._writer.add_text(title, f"| | |\n| --- | --- |\n{rows}", run.resumed_step or 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of one step.

        The writer has a thread of its own.
        """
        assert self._writer is not None, "log before start"
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def saved(self, step: int) -> None:
        """Write what is queued."""
        if self._writer is not None:
            self._writer.flush()

    def finish(self, status: Literal["finished", "stopped", "interrupted", "failed"], model: Path | None) -> None:
        """Close the file. A second call does nothing."""
        if self._writer is not None:
            self._writer.add_text("end", status if model is None else f"{status}, `{model}`")
            self._writer.close()
            self._writer = None

    def location(self) -> str | None:
        """Give the command that shows all runs of the folder."""
        return None if self._folder is None else f"tensorboard --logdir {shlex.quote(str(self._folder))}"

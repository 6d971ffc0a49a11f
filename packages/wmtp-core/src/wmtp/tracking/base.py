"""Contract of a tracker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, Literal

from attrs import field, frozen

from wmtp.errors import described
from wmtp.plugins.contract import Contract
from wmtp.plugins.failures import plugin_failure
from wmtp.storage.base import Storage

__all__ = ["TRACKED_ANEW", "RunInfo", "Tracker", "failure", "title"]

#: what to do with a damaged file that keeps the id of the tracker's run
TRACKED_ANEW: Final = "remove it, and the rest of the run is tracked as a new one"


@frozen(kw_only=True)
class RunInfo:
    """Facts of a run, given to a tracker at the start.

    Args:
        name: the run's name.
        run_dir: the run directory; it holds ``config.toml``. A tracker may keep a file of its own there, to find its run
            again after a resume.
        tags: ``run.tags`` and facts such as the versions and the git commit.
        params: the config, flat: ``{"optimizer.lr": "0.001", …}``.
        resumed_step: the step of the checkpoint that the run resumes from; None for a new run.
        logged: after a resume, the last step of each metric that earlier attempts have logged: it may be beyond
            ``resumed_step``. See `Tracker.log`.
        backends: the storage backends by the scheme that they serve, for a tracker that keeps something at a URI.
    """

    name: str
    run_dir: Path
    tags: Mapping[str, str]
    params: Mapping[str, str]
    resumed_step: int | None = None
    logged: Mapping[str, int] = field(factory=dict)
    backends: Mapping[str, Storage] = field(factory=dict)


class Tracker(Contract, ABC, contract=True):
    """Receives a run's parameters and metrics. Only one process calls it.

    Training never stops for a tracker once it has started: after `start`, a tracker that cannot reach its server says so once
    (`logging.getLogger("wmtp")`), keeps what was missed and sends it when the server is back.

    Attributes:
        starts_in_thread: `start` may be called in another thread than the rest, so that the model loads meanwhile.
        ends_by_itself: `log_artifact` and `finish` give up where their service hangs, and are waited for. Else they are called
            in another thread than the rest, and the tracker is left behind after ten minutes.
    """

    starts_in_thread: ClassVar[bool] = False
    ends_by_itself: ClassVar[bool] = False

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Open the run, or reopen it if ``run.resumed_step`` is set.

        Raises:
            WMTPError: the tracker cannot be used; the message says what to do.
        """

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one optimizer step.

        After a resume the steps beyond ``run.resumed_step`` come a second time. A metric must have one point a step all the
        same: replace the earlier point where the service can, else leave out what ``run.logged`` says was logged.
        """

    def log_artifact(self, file: Path) -> None:
        """Store a file of the run; default: ignore it.

        Such as the page of ``wmtp report``. Called before `finish`. The file does not change until `finish` returns.
        """

    def saved(self, step: int) -> None:
        """Save what is known so far: a checkpoint was written.

        It should survive this machine. Returns at once.
        """

    @abstractmethod
    def finish(self, status: Literal["finished", "stopped", "interrupted", "failed"], model: Path | None) -> None:
        """Send what is left, record the model's place, close the run."""

    def location(self) -> str | None:
        """Return a line for the user on how to see the run.

        For instance a command or an address.
        """
        return None


def failure(tracker: Tracker, error: Exception) -> str:
    """Word a tracker's failure, of which a run only warns."""
    if (of_plugin := plugin_failure(error)) is not None:
        return f"the tracker failed: {of_plugin}"
    return f"{title(tracker)} failed: {described(error)}"


def title(tracker: Tracker) -> str:
    """Name a tracker in a message."""
    return f"the tracker {type(tracker).__module__}.{type(tracker).__qualname__}"

"""Contracts of launchers: one that trains here, and one that trains elsewhere."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from attrs import evolve, field, frozen

from wmtp.errors import ConfigError
from wmtp.plugins.contract import Contract

if TYPE_CHECKING:
    from wmtp.config.schema import Config
    from wmtp.runs.result import Result

__all__ = ["LaunchPlan", "Launcher", "RemoteLauncher", "RunState", "RunStatus"]


class Launcher(Contract, ABC, contract=True):
    """Makes a checked config run somewhere."""

    @abstractmethod
    def launch(self, config: Config, run_dir: Path, *, resume: bool) -> Result:
        """Run ``config`` to its end.

        Args:
            config: complete and checked.
            run_dir: the run directory; it holds ``config.toml`` and ``run.json`` already.
            resume: whether to resume from the newest checkpoint of that directory.
        """


class RunState(enum.Enum):
    """State of a run on a service."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """True if the run has ended."""
        return self not in (RunState.WAITING, RunState.RUNNING)


@frozen(kw_only=True)
class RunStatus:
    """Status of a run, as the service reports it.

    Args:
        state: the state.
        word: the service's own word for it.
        reason: the reason, where the service gives one.
        url: the run's page for a browser.
    """

    state: RunState
    word: str
    reason: str | None = None
    url: str | None = None


@frozen(kw_only=True)
class LaunchPlan:
    """Complete request to a service, before anything is sent.

    Args:
        text: all of it, in the service's own format. It holds no secret: it is printed, kept, and may be shared.
        digest: equal for plans that would do the same.
        warnings: what is allowed and yet unwise, one line each: ``dotted.key: what may go wrong; what to do``.
        facts: what a person wants to see first, by name.
        record: what is kept with the run's id, by name: for instance the digest of the image.
    """

    text: str
    digest: str
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(factory=dict)
    record: Mapping[str, str | None] = field(factory=dict)


class RemoteLauncher(Launcher, contract=True):
    """Launcher that hands a run to a service.

    ``wmtp launch``, ``status``, ``logs``, ``cancel`` and ``metrics`` work through it.

    Its config class has the class variable ``remote = True``: files of the config are then those of the other place, and
    need not exist here. `build` and `plan` import no torch and touch no network.

    Any method but `check` and `plan` may raise `wmtp.errors.AuthenticationError`, `wmtp.errors.PlatformError`, and
    `wmtp.ConfigError` for what the service refuses.

    Attributes:
        home: the working folder of the image, where ``wmtp start`` runs.
    """

    home = Path("/app")

    @final
    def launch(self, config: Config, run_dir: Path, *, resume: bool) -> Result:
        """Refused: ``wmtp run`` trains; see `Launcher.launch`."""
        name = config.launcher.type
        raise ConfigError(
            f"launcher.type: '{name}' hands the run to a service; write wmtp launch --on {name} with these files, or train"
            " here with --set launcher.type=local"
        )

    def inside(self, config: Config) -> Config:
        """Return the config for the other place, with the local launcher."""
        from wmtp.launchers.config import LocalLauncher

        return evolve(config, launcher=LocalLauncher())

    def check(self, config: Config) -> Iterable[str]:
        """Report problems of ``config`` for this place, one line each.

        The form of a line is ``dotted.key: what is wrong; what to do``.
        """
        return ()

    @abstractmethod
    def plan(self, config: Config) -> LaunchPlan:
        """Plan the launch from the config alone; equal configs give equal plans.

        Args:
            config: complete and checked.
        """

    def validate(self, config: Config, plan: LaunchPlan) -> Sequence[str]:
        """Ask the service whether it would take the plan.

        That is about names that must exist, and limits. Nothing is started.

        Returns:
            what could not be asked, one line each.

        Raises:
            ConfigError: what the service refuses, with what it has instead.
        """
        return ()

    def find(self, plan: LaunchPlan) -> Sequence[str] | None:
        """List the ids of this plan's living runs, whoever started them.

        None, the default, where the service cannot be asked: then a plan whose answer was lost is not sent again unasked.
        """
        return None

    @abstractmethod
    def submit(self, plan: LaunchPlan) -> str:
        """Start the run, once.

        A request whose answer is lost is not repeated.

        Returns:
            the run's id.
        """

    @abstractmethod
    def status(self, run: str) -> RunStatus:
        """Ask for a run's status.

        Args:
            run: its id.
        """

    @abstractmethod
    def logs(self, run: str, *, tail: int | None, follow: bool) -> Iterator[str]:
        """Yield the lines that the run printed, each once and in order.

        Args:
            run: its id.
            tail: number of last lines to begin with; None: all.
            follow: continue with new lines until the run is over, through lost connections.
        """

    @abstractmethod
    def cancel(self, run: str) -> None:
        """Ask the service to end a run.

        A run that is over already stays as it is.

        Args:
            run: its id.
        """

    def metrics(self, run: str) -> Mapping[str, float]:
        """Return the latest machine metrics of the service, by name: ``gpu/0/utilization (%)``.

        Args:
            run: its id.
        """
        return {}

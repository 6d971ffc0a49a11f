"""Launch runs on a service, and ask for them. Imports no torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from attrs import frozen

from wmtp.api import load_checked
from wmtp.config.load import ConfigSource
from wmtp.launchers.base import LaunchPlan, RunState, RunStatus
from wmtp.launchers.remote import find_launched, remote_launcher, submit
from wmtp.public import public
from wmtp.runs.records import Record

__all__ = ["LaunchedRun", "Measurements", "Submitted", "cancel", "launch", "logs", "metrics", "status"]

logger = logging.getLogger("wmtp")
_SAMPLED_LINES = 1000


@frozen(kw_only=True)
class Submitted:
    """Result of `launch`.

    Args:
        launcher: its ``type``.
        plan: what was sent, or would be.
        run: the run's id; None for a dry run.
        record: what this machine keeps of it; None for a dry run.
    """

    launcher: str
    plan: LaunchPlan
    run: str | None = None
    record: Record | None = None


@frozen(kw_only=True)
class LaunchedRun:
    """State of a launched run.

    Args:
        run: its id.
        status: as the service says it.
        record: what this machine keeps of it; None for a run that was launched elsewhere.
        was_over: `cancel` came too late.
    """

    run: str
    status: RunStatus
    record: Record | None = None
    was_over: bool = False

    @property
    def state(self) -> RunState:
        """Waiting, running, or how it ended."""
        return self.status.state


@frozen(kw_only=True)
class Measurements:
    """Result of `metrics`.

    Args:
        run: its id.
        service: numbers of the service, by name.
        own: the last numbers that the run itself has printed, by name.
    """

    run: str
    service: Mapping[str, float]
    own: Mapping[str, float]


@public
def launch(
    config: ConfigSource | Sequence[ConfigSource],
    *,
    overrides: Iterable[str] = (),
    on: str | None = None,
    dry_run: Literal["local", "server"] | None = None,
    again: bool = False,
    on_plan: Callable[[LaunchPlan], None] | None = None,
) -> Submitted:
    """Hand a run to a service, as ``wmtp launch`` does.

    Args:
        config: as for `wmtp.run`.
        overrides: ``KEY=VALUE`` texts, as for ``--set``.
        on: the launcher. Default: what ``[launcher]`` says.
        dry_run: ``local`` only makes the plan; ``server`` also asks the service whether it would take it.
        again: also where the same plan is running already.
        on_plan: called with the plan before the service hears of it.

    Raises:
        ConfigError: the config is wrong, its launcher runs things here, or the plan is running already.
        AuthenticationError, PlatformError: the service refuses the user, or fails.
    """
    checked = load_checked(config, overrides=[*overrides, *([f"launcher.type={on}"] if on else [])]).config
    launcher = remote_launcher(checked.launcher)
    plan = launcher.plan(checked)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    if on_plan is not None:
        on_plan(plan)
    answer = Submitted(launcher=checked.launcher.type, plan=plan)
    if dry_run == "local":
        return answer
    for remark in launcher.validate(checked, plan):
        logger.warning("%s", remark)
    if dry_run == "server":
        return answer
    record = submit(checked, launcher, plan, again=again)
    return Submitted(launcher=checked.launcher.type, plan=plan, run=str(record.run), record=record)


@public
def status(run: str, *, config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = ()) -> LaunchedRun:
    """Ask how far a launched run is, as ``wmtp status`` does.

    Args:
        run: the id that `launch` returned, or ``run.name``.
        config: a TOML file with its ``[launcher]``, or several, for a run that was launched elsewhere.

    Raises:
        ConfigError: it is not known here, or to the service.
        AuthenticationError, PlatformError: the service refuses the user, or fails.
    """
    launcher, found, record = find_launched(run, config)
    return LaunchedRun(run=found, status=launcher.status(found), record=record)


@public
def logs(
    run: str,
    *,
    config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    tail: int | None = None,
    follow: bool = False,
) -> Iterator[str]:
    """Iterate over the log of a launched run, as ``wmtp logs`` does.

    Args:
        run: as for `status`.
        config: as for `status`.
        tail: only the last lines of what there is.
        follow: continue until the run is over.
    """
    launcher, found, _ = find_launched(run, config)
    return launcher.logs(found, tail=tail, follow=follow)


@public
def cancel(run: str, *, config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = ()) -> LaunchedRun:
    """End a launched run, as ``wmtp cancel`` does.

    One that is over stays as it is. Arguments and errors: see `status`.
    """
    launcher, found, record = find_launched(run, config)
    before = launcher.status(found)
    if before.state.is_over:
        return LaunchedRun(run=found, status=before, record=record, was_over=True)
    launcher.cancel(found)
    return LaunchedRun(run=found, status=launcher.status(found), record=record)


@public
def metrics(run: str, *, config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = ()) -> Measurements:
    """Read a launched run's machine load, as ``wmtp metrics`` does.

    Arguments and errors: see `status`.
    """
    from wmtp.launchers.samples import latest_sample

    launcher, found, _ = find_launched(run, config)
    service = dict(launcher.metrics(found))
    return Measurements(run=found, service=service, own=latest_sample(launcher.logs(found, tail=_SAMPLED_LINES, follow=False)))

"""Launching on a service: nothing starts twice, and nothing is lost.

What was started is found again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from wmtp.config.converter import make_converter
from wmtp.config.problems import Problems
from wmtp.config.schema import Config
from wmtp.config.sources import Document, MappingSource
from wmtp.config.toml_file import FileSource
from wmtp.errors import AuthenticationError, ConfigError, PlatformError, WMTPError
from wmtp.launchers.base import LaunchPlan, RemoteLauncher
from wmtp.plugins import load_plugins
from wmtp.plugins.built import returned
from wmtp.plugins.components import component
from wmtp.plugins.contract import LauncherConfig
from wmtp.runs import records
from wmtp.runs.records import Record

__all__ = ["find_launched", "remote_launcher", "submit"]

logger = logging.getLogger("wmtp")


@attrs.frozen
class _Section:
    launcher: LauncherConfig = component("launchers")


def remote_launcher(component: LauncherConfig) -> RemoteLauncher:
    """Build the launcher of a config, which must be a remote one.

    Raises:
        ConfigError: it runs things here.
    """
    if not component.remote:
        names = [p.type for p in load_plugins().of_kind("launchers") if p.cls.remote]
        raise ConfigError(
            f"launcher.type: '{component.type}' runs on this machine; use wmtp run, or --on NAME; services with a launcher"
            f" here: {', '.join(names) or 'none; wmtp-vessl has one'}"
        )
    return returned(component, "launchers", "build", RemoteLauncher, component.build())


def submit(config: Config, launcher: RemoteLauncher, plan: LaunchPlan, *, again: bool) -> Record:
    """Start a plan that is not running yet, and record it.

    Args:
        config: the plan's config.
        launcher: what it is launched by.
        plan: what is sent.
        again: start it even where it is running already.

    Raises:
        ConfigError: it is running already, or may be; or the service refuses it.
        AuthenticationError, PlatformError: see `RemoteLauncher`.
    """
    with records.submitting(plan):
        found = launcher.find(plan)
        pending = [r for r in records.records() if r.digest == plan.digest and r.run is None]
        if not again:
            _refuse_running(launcher, plan, found, pending)
        record = Record.of(config, plan)
        records.add(record)
        try:
            run = launcher.submit(plan)
        except (ConfigError, AuthenticationError):  # a clear no
            if not pending:
                records.remove(record)
            raise
        except PlatformError:
            run = _lost(launcher, plan, found)
            if run is None:
                raise
            logger.warning("the answer was lost, but the run exists: %s", run)
        records.add(record.named(run))
        records.remove(record)
        return record.named(run)


def _refuse_running(launcher: RemoteLauncher, plan: LaunchPlan, found: Sequence[str] | None, pending: Sequence[Record]) -> None:
    runs = list(found or ())
    for record in records.records():
        if record.digest == plan.digest and record.run is not None and record.run not in runs:
            try:
                if not launcher.status(record.run).state.is_over:
                    runs.append(record.run)
            except ConfigError:  # the service has forgotten it
                continue
    if runs:
        raise ConfigError(
            f"this plan is running already, as {', '.join(runs)}; see it with wmtp logs {runs[0]} --follow, or start it once"
            " more with --again"
        )
    if pending and found is None:
        raise ConfigError(
            f"this plan was sent at {pending[0].submitted}, and the answer was lost: it may be running; look at the service,"
            " then start it with --again"
        )


def _lost(launcher: RemoteLauncher, plan: LaunchPlan, before: Sequence[str] | None) -> str | None:
    """Find the run of a request whose answer was lost.

    None where the service does not have it.
    """
    try:
        after = launcher.find(plan)
    except WMTPError:
        return None
    new = [run for run in after or () if run not in (before or ())]
    return new[0] if len(new) == 1 else None


def find_launched(
    run: str, files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
) -> tuple[RemoteLauncher, str, Record | None]:
    """Find a launched run: its launcher, its id and its record.

    Args:
        run: the service's id, or the name of a run that was launched from this machine.
        files: a TOML file with its ``[launcher]``, or several, for a run that was launched elsewhere.

    Raises:
        ConfigError: it is not known here.
    """
    known = [record for record in records.records() if record.run is not None]
    matching = [record for record in known if record.run == run] or [record for record in known if record.name == run]
    if files:
        document = Document()
        for source in map(FileSource, [files] if isinstance(files, str | os.PathLike) else files):
            document.merge(source.data, source)
        return remote_launcher(_read(document)), run, None
    if not matching:
        last = f"; the last one was {known[0].run}" if known else ""
        raise ConfigError(
            f"no run '{run}' was launched from this machine{last}; for one from elsewhere name the files with its [launcher]:"
            f" --config FILE"
        )
    record = matching[0]
    document = Document()
    document.merge({"launcher": record.settings}, MappingSource())
    return remote_launcher(_read(document)), str(record.run), record


def _read(document: Document) -> Any:
    problems = document.expand(os.environ) if isinstance(document.data.get("launcher"), Mapping) else []
    problems = [problem for problem in problems if problem.path[:1] == ("launcher",)]
    try:
        section = make_converter(load_plugins()).structure(
            {key: value for key, value in document.data.items() if key == "launcher"}, _Section
        )
    except Problems as found:
        problems += found.problems
    else:
        if not problems:
            return section.launcher
    raise ConfigError([document.locate(problem) for problem in problems])

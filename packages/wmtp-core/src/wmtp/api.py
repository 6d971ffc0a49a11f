"""Run a config from start to result: sources, checks, run directory, launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, overload

from attrs import evolve, fields

from wmtp.checkpoints.remote import remote_checkpoints
from wmtp.config.advice import unwise_settings
from wmtp.config.inputs import anchored, hub_names_read, pinned, with_uris
from wmtp.config.load import ConfigSource, Loaded, load
from wmtp.config.places import build_backends
from wmtp.config.problems import Problem
from wmtp.config.rules import check_loaded
from wmtp.config.schema import Config
from wmtp.config.sources import Document, MappingSource
from wmtp.config.tree import dump_config
from wmtp.distributed.environment import Nodes, Worker
from wmtp.errors import ConfigError, WMTPError
from wmtp.evaluation.consent import allow_code_execution as permit_code_execution
from wmtp.evaluation.consent import code_execution_allowed, require_consent
from wmtp.launchers.local import Local
from wmtp.log_lines import lines_by_itself
from wmtp.plugins.built import built, returned
from wmtp.public import public
from wmtp.runs import directory as run_dirs
from wmtp.runs.fixed import fixed
from wmtp.runs.result import Result
from wmtp.spelling import is_text
from wmtp.storage.uris import backend_for, file_path, local_path

__all__ = ["load_checked", "run"]

logger = logging.getLogger("wmtp")


@overload
def run(
    config: ConfigSource | Sequence[ConfigSource] | None = None,
    *,
    overrides: Iterable[str] = (),
    run_name: str | None = None,
    tags: Iterable[str] = (),
    resume: str | os.PathLike[str] | None = None,
    dry_run: Literal[False] = False,
    allow_code_execution: bool = False,
) -> Result: ...


@overload
def run(
    config: ConfigSource | Sequence[ConfigSource] | None = None,
    *,
    overrides: Iterable[str] = (),
    run_name: str | None = None,
    tags: Iterable[str] = (),
    resume: str | os.PathLike[str] | None = None,
    dry_run: Literal[True],
    allow_code_execution: bool = False,
) -> Mapping[str, Any]: ...


@public
def run(
    config: ConfigSource | Sequence[ConfigSource] | None = None,
    *,
    overrides: Iterable[str] = (),
    run_name: str | None = None,
    tags: Iterable[str] = (),
    resume: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    allow_code_execution: bool = False,
) -> Result | Mapping[str, Any]:
    """Train by a config, as ``wmtp run`` does.

    Args:
        config: a TOML file, a mapping, a `Config`, or a list of them, the later laid over the earlier. May be left out where
            ``resume`` names a run directory: its own config is used.
        overrides: ``KEY=VALUE`` texts, as for ``--set``.
        run_name: in place of ``run.name``.
        tags: added to ``run.tags``.
        resume: a run directory to resume, or ``"auto"``: the directory of ``run_name`` (``run.name``) if there is one,
            else the newest unfinished run that has this config and no name of its own; a new run where there is none.
        dry_run: do everything but the training steps, and return what was found.
        allow_code_execution: whether evaluators of ``[[eval]]`` may run code that the model writes, in a sandbox.

    Returns:
        the result; for ``dry_run`` facts by name.

    Raises:
        ConfigError: the config is wrong, the name is taken, or the run to resume is missing or has another config.
        WMTPError: the work failed.
        KeyboardInterrupt: Ctrl-C. Where the run has saved a checkpoint, ``error.result`` is its result. SIGTERM while the run
            trains, or after that, returns the result, with the status ``interrupted``.
    """
    with lines_by_itself(), permit_code_execution(allow_code_execution or code_execution_allowed()):
        loaded = load_checked(config, overrides=overrides, run_name=run_name, tags=tags, resume=resume)
        try:
            return _run(loaded, resume, dry_run=dry_run)
        except ConfigError as error:
            raise _with_lines(error, loaded.document) from error


def _with_lines(error: ConfigError, document: Document) -> ConfigError:
    """Name file and line of keys found wrong after the checks.

    Only the model, the data or the device shows what is wrong with them.
    """
    sections = {field.name for field in fields(Config)}
    problems = [(line, Problem.of_line(line)) for line in error.problems]
    return error.reworded(
        document.locate(problem) if problem.path and problem.path[0] in sections else line for line, problem in problems
    )


def _run(loaded: Loaded, resume: str | os.PathLike[str] | None, *, dry_run: bool) -> Result | Mapping[str, Any]:
    checked = loaded.config
    require_consent(checked.eval, code_execution_allowed())
    launcher = built(checked.launcher, "launchers")
    if dry_run:
        from wmtp.training.dry_run import dry_run as try_out

        _check_push(checked)
        if isinstance(launcher, Local):
            launcher.count(checked)
        return try_out(with_uris(checked, pinned(loaded)))
    if isinstance(launcher, Local):
        if (worker := Worker.of()) is not None:
            launcher.check_started()
            return _unless_ctrl_c(_run_as_one_of_several(loaded, resume, worker))
        if (nodes := Nodes.of()).rank:
            return _unless_ctrl_c(launcher.follow(checked, nodes))
    anchored_config = anchored(checked)  # a plugin may change the working folder
    with _prepared(loaded, resume) as (directory, is_resumed):

        def launch() -> Result:
            found = launcher.launch(checked, directory, resume=is_resumed)
            return returned(checked.launcher, "launchers", "launch", Result, found)

        result = _recorded(directory, launch)
        _push(anchored_config, result)
    return _unless_ctrl_c(result)


def _unless_ctrl_c(result: Result) -> Result:
    """Return a result, or raise KeyboardInterrupt if Ctrl-C ended the run.

    Who presses Ctrl-C wants no next run to begin. An exception class of its own would not do: only a plain KeyboardInterrupt
    ends Python as SIGINT does, which ends a shell's loop too.
    """
    if result.signal != "SIGINT":
        return result
    how = f"to resume: wmtp run --resume {result.run_dir}"
    if result.status != "interrupted":
        how = f"the run is {result.status}, and whole: {result.run_dir}"
    error = KeyboardInterrupt(f"interrupted after {result.steps} steps; {how}")
    error.result = result  # type: ignore[attr-defined]
    raise error


@contextmanager
def _prepared(loaded: Loaded, resume: str | os.PathLike[str] | None) -> Iterator[tuple[Path, bool]]:
    """Yield the locked run directory, and whether it is resumed.

    A new directory in which no step was trained is removed again.
    """
    checked = loaded.config
    _check_push(checked)  # before hours are spent
    for warning in (*loaded.document.drops(), *unwise_settings(checked)):
        logger.warning("%s", warning)
    directory = _directory_to_resume(checked, resume)
    if resume == "auto":
        logger.info("no run to resume; starting a new one" if directory is None else f"resuming {directory}")
    is_resumed = directory is not None
    if directory is None:
        directory = run_dirs.create(checked, loaded.registry, sys.argv, pinned(loaded))
    with run_dirs.lock(directory):
        if is_resumed:
            _take_up(directory, loaded)
        try:
            yield directory, is_resumed
        except BaseException:  # Ctrl-C too
            if not is_resumed:  # else the name would be taken when what was wrong is put right
                run_dirs.remove_unused(directory)
            raise


def _check_push(config: Config) -> None:
    if (uri := config.run.push_to) is not None:
        try:
            backend_for(uri, build_backends(config.storage)).check_push(uri)
        except ConfigError as error:
            raise error.under("run.push_to") from error


def _push(config: Config, result: Result) -> None:
    """Push an ended run's model, where the config says so.

    Raises:
        WMTPError: it could not be pushed; the run itself is whole, and ``error.result`` its result.
    """
    if (uri := config.run.push_to) is None or result.model is None or result.status == "interrupted":
        return
    from wmtp.exporting.pushing import push_run

    again = f"the run is whole, its model is in {result.model}; push it with: wmtp push {result.run_dir} {uri}"
    if result.signal is not None:
        logger.warning("%s: nothing is pushed; %s", result.signal, again)
        return
    try:
        push_run(result.run_dir, uri, config.storage)
    except WMTPError as error:
        failure = WMTPError(f"run.push_to: {error}; {again}")
        failure.result = result  # type: ignore[attr-defined]
        raise failure from error
    logger.info("pushed to %s", uri)


def _run_as_one_of_several(loaded: Loaded, resume: str | os.PathLike[str] | None, worker: Worker) -> Result:
    """Train in this process, one of several that were started.

    torchrun or a cluster has started them; rank 0 has the run directory.
    """
    from wmtp.distributed.start import joined
    from wmtp.training.run import train

    anchored_config = anchored(loaded.config)
    with joined(loaded.config, worker) as ranks, ExitStack() as stack:
        directory, is_resumed = ranks.main_only(lambda: stack.enter_context(_prepared(loaded, resume)))

        def work() -> Result:
            return train(loaded.config, directory, resume=is_resumed, ranks=ranks)

        result = _recorded(directory, work) if ranks.is_main else work()
    if worker.rank == 0:
        _push(anchored_config, result)
    return result


def load_checked(
    config: ConfigSource | Sequence[ConfigSource] | None,
    *,
    overrides: Iterable[str] = (),
    run_name: str | None = None,
    tags: Iterable[str] = (),
    resume: str | os.PathLike[str] | None = None,
) -> Loaded:
    """Load and check a config, as ``wmtp check`` does.

    `run` does so first. Arguments: see `run`.

    Raises:
        ConfigError: every problem at once.
    """
    if isinstance(config, list | tuple) and not config:
        config = None
    directory = _existing_run(resume) if resume is not None and resume != "auto" else None
    if directory is not None:
        run_dirs.name_of(directory)  # said before the config is read: an empty file lacks everything
    if directory is not None and run_name is not None:
        raise ConfigError("--run-name: a resumed run keeps its name; leave it out, or write --resume auto")
    if config is None:
        if directory is None:
            raise ConfigError("no config: name a TOML file, or a run directory to resume")
        config = directory / run_dirs.CONFIG_FILE
    loaded = load(config, overrides)
    section = loaded.config.run
    if directory is not None:  # wherever that is now
        section = evolve(section, name=run_dirs.name_of(directory))
        if not _is_same_folder(section.output_dir, directory.parent):
            section = evolve(section, output_dir=str(directory.parent))
    if run_name is not None:
        section = evolve(section, name=run_name)
        loaded.document.origins["run", "name"] = MappingSource()  # no file is to blame for this name
    if no_text := [tag for tag in tags if not is_text(tag)]:
        raise ConfigError(f"--tags: {no_text[0]!r} is not UTF-8 text; set the terminal to UTF-8")
    section = evolve(section, tags=(*section.tags, *(tag for tag in tags if tag not in section.tags)))
    loaded = evolve(loaded, config=evolve(loaded.config, run=section))
    loaded, named = hub_names_read(loaded)
    check_loaded(loaded)
    for line in named:
        logger.info("%s", line)
    return loaded


def _is_same_folder(output_dir: str, folder: Path) -> bool:
    try:
        return file_path(output_dir).samefile(folder)
    except (OSError, ConfigError):  # it is gone; the rules report what is wrong with the config
        return False


def _existing_run(resume: str | os.PathLike[str]) -> Path:
    path = local_path(resume, key="--resume")
    if not run_dirs.is_run_dir(path):
        found = "holds no run (no config.toml)" if path.exists() else "does not exist"
        raise ConfigError(f"--resume {os.fspath(resume)}: {found}")
    return path.resolve()


def _directory_to_resume(config: Config, resume: str | os.PathLike[str] | None) -> Path | None:
    if resume is None:
        return None
    if resume != "auto":
        return _existing_run(resume)
    if config.run.name is None:
        found = run_dirs.find_unfinished(config)
    else:
        path = file_path(config.run.output_dir) / config.run.name
        found = path if run_dirs.is_run_dir(path) else None
    return found if found is not None else _begun_elsewhere(config)


def _begun_elsewhere(config: Config) -> Path | None:
    """Make a directory here for a run begun elsewhere.

    Its checkpoints are at ``checkpoints.uri``; None where there are none.
    """
    remote = remote_checkpoints(config)
    if remote is None or not remote.steps():
        return None
    logger.info("%s holds checkpoints of this run, begun elsewhere", remote.uri)
    return run_dirs.adopt(config, remote.fetch_run)


def _take_up(directory: Path, loaded: Loaded) -> None:
    """Check that the config is the run's own, and note changes."""
    found = run_dirs.differences(directory, loaded.config)
    if found.refused:
        is_longer = any(line.partition(": ")[0] in run_dirs.LENGTH for line in found.refused)
        raise ConfigError(
            [f"--resume {directory}: the config differs from the run's: {line}" for line in found.refused]
            + ([_ways_to_go_on(directory, loaded.config)] if is_longer else [])
            + [f"--resume {directory}: undo the differences, or start a new run under another --run-name"]
        )
    for line in found.free:
        logger.info("resumed with a change: %s", line)
    if found.altering:
        logger.warning("resumed with a change, after which steps are computed otherwise: %s", "; ".join(found.altering))
    changed = [*found.altering, *found.free]
    for line in run_dirs.changed_versions(directory, loaded.config, loaded.registry):
        logger.warning("resumed with another version, which may change the results: %s", line)
    run_dirs.record_resume(directory, loaded.config, loaded.registry, sys.argv, changed)
    if changed:
        run_dirs.replace_text(directory / run_dirs.CONFIG_FILE, dump_config(fixed(directory, loaded.config)))


def _ways_to_go_on(directory: Path, config: Config) -> str:
    """Say how to train a run beyond its planned length.

    The learning rate of its steps was planned for that length.
    """
    schedule = config.schedule
    planned = f'type = "{schedule.type}"' if schedule.type != "constant" else f"warmup_ratio = {schedule.warmup_ratio:g}"
    return (
        f"--resume {directory}: the learning rate of every step was planned for the run's length (schedule {planned}), so it"
        f" cannot be made longer; train its model further in a new run: wmtp run {directory}/config.toml --run-name NEW"
        f" --set models.base.type=hf --set models.base.uri={directory}/model"
    )


def _recorded(directory: Path, work: Callable[[], Result]) -> Result:
    """Do the work, and write into ``run.json`` how it ended."""
    status = "failed"
    try:
        result = work()
        status = result.status
        return result
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        try:
            run_dirs.record(directory, {"status": status, "ended": datetime.now().astimezone().isoformat(timespec="seconds")})
        except OSError as error:  # a full disk: what went wrong before matters more
            logger.warning("%s could not be written: %s", directory / run_dirs.INFO_FILE, error)

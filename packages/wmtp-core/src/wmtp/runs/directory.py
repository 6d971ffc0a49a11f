"""Run directories: created atomically, locked, found for a resume."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from wmtp.config.inputs import anchored, inputs, with_uris
from wmtp.config.schema import Config, ScheduleConfig
from wmtp.config.secrets import is_secret
from wmtp.config.sources import escape
from wmtp.config.tree import components, dump_config, flat, to_mapping
from wmtp.errors import ConfigError, FileError, WMTPError
from wmtp.json_files import read_json_object
from wmtp.plugins.registry import Registry
from wmtp.runs.files import CONFIG_FILE, INFO_FILE, read_snapshot
from wmtp.runs.fixed import fixed, given_inputs
from wmtp.storage.atomic import replace_text
from wmtp.storage.lock import FileLock
from wmtp.storage.uris import file_path

__all__ = [
    "CONFIG_FILE",
    "INFO_FILE",
    "LENGTH",
    "Differences",
    "adopt",
    "changed_versions",
    "create",
    "decays",
    "differences",
    "find_unfinished",
    "git",
    "is_free_to_change",
    "is_run_dir",
    "lock",
    "record",
    "runs_in",
]

_LOCK_FILE: Final = ".lock"

#: keys that a resumed run may change: none of them changes what is computed
_FREE_TO_CHANGE: Final = re.compile(
    r"run\.(output_dir|tags|push_to)|(tracker|launcher|storage|eval|report)(\..*)?|checkpoints\.(save_interval|keep_last|save_final)"
    r"|devices\.(threads|timeout|fsdp(\..*)?)|data\.cache_dir|data\.train\.micro_batch_size|train\.(log|accuracy)_interval"
)


def is_free_to_change(key: str) -> bool:
    """Tell whether a resume may change a key.

    It may where the key changes nothing that is computed.
    """
    return _FREE_TO_CHANGE.fullmatch(key) is not None


_OF_PRECISION: Final = re.compile(r"devices\.(precision|fp8(\..*)?)")

#: keys that say how long a run is: they may change where the learning rate of a step does not depend on them
LENGTH: Final = ("train.max_steps", "train.epochs")


def decays(schedule: ScheduleConfig) -> bool:
    """Tell whether learning rates depend on the run's number of steps."""
    return schedule.type != "constant" or bool(schedule.warmup_ratio)


def create(config: Config, registry: Registry, argv: Sequence[str], pins: Mapping[str, str] | None = None) -> Path:
    """Make a new run's directory, with ``config.toml`` and ``run.json``.

    ``config.toml`` means the same in every working folder and at any time: paths are absolute, and names of the hub have the
    commit. ``run.json`` keeps how the inputs were given.

    Args:
        config: complete and checked.
        registry: the plugins.
        argv: the command line.
        pins: what `wmtp.config.inputs.pinned` found.

    Raises:
        ConfigError: the name is taken, or nothing can be written there.
    """
    started = datetime.now().astimezone()
    snapshot = anchored(with_uris(config, pins or {}))
    given = {old.key: old.uri for old, new in zip(inputs(config), inputs(snapshot), strict=True) if old.uri != new.uri}

    def write(draft: Path) -> None:
        (draft / CONFIG_FILE).write_text(dump_config(snapshot), encoding="utf-8")
        facts = _facts(config, registry, argv, started) | {"given": given}
        (draft / INFO_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    return _make(config, started, write)


def adopt(config: Config, fetch: Callable[[Path], None]) -> Path:
    """Make the directory of a run that was begun on another machine.

    Args:
        config: what it is resumed with; for its name and place.
        fetch: puts the files of the run's directory into a folder.

    Raises:
        ConfigError: nothing can be written there.
        WMTPError: the files could not be fetched, or are those of no run.
    """

    def write(draft: Path) -> None:
        fetch(draft)
        if not is_run_dir(draft):
            raise WMTPError(
                f"the files fetched for {config.run.name or 'the run'} are those of no run: {CONFIG_FILE} is missing"
            )

    return _make(config, datetime.now().astimezone(), write)


def _make(config: Config, started: datetime, write: Callable[[Path], None]) -> Path:
    """Make a run directory that appears whole or not at all."""
    parent = file_path(config.run.output_dir)
    draft = parent / f".new-{uuid.uuid4().hex}"
    try:
        draft.mkdir(parents=True)
        write(draft)
        names = [config.run.name] if config.run.name is not None else _free_names(config.trainer.type, started)
        for name in names:
            try:
                draft.rename(parent / name)  # fails where a folder with something in it has the name
                return parent / name
            except OSError:
                if not (parent / name).exists():
                    raise
        raise ConfigError(
            f"run.name: {parent / str(config.run.name)} exists already; resume that run by --resume auto,"
            " or choose another name with --run-name"
        )
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {parent}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _free_names(trainer: str, started: datetime) -> Iterator[str]:
    name = f"{re.sub(r'[^A-Za-z0-9_.+-]', '-', trainer)}-{started:%Y%m%d-%H%M%S}"
    yield name
    for number in range(2, 1000):
        yield f"{name}-{number}"


def _facts(config: Config, registry: Registry, argv: Sequence[str], started: datetime) -> dict[str, Any]:
    return {
        "status": "running",
        "started": started.isoformat(timespec="seconds"),
        "named": config.run.name is not None,
        "seed": config.run.seed,
        "argv": [_without_secret(argument) for argument in argv],
        "git": git(),
        "python": sys.version.split()[0],
        "versions": _versions(config, registry),
    }


def _versions(config: Config, registry: Registry) -> dict[str, str]:
    """Collect the versions of all packages that affect the result, where installed."""
    versions: dict[str, str] = {}
    for name in ("wmtp-core", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for placed in components(config):
        plugin = registry.provider(type(placed.config))
        if plugin is not None:
            versions[plugin.distribution] = plugin.version
    return versions


def _without_secret(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if equals and is_secret(key, value):
        return f"{key}=***"
    return "***" if is_secret("", argument) else argument


def git() -> dict[str, Any] | None:
    """Return the commit of the current directory; None outside a repository."""
    try:
        commit = _output("git", "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, stdin=subprocess.DEVNULL)
    return done.stdout.strip()


def record(run_dir: Path, changes: Mapping[str, Any]) -> None:
    """Add to ``run.json``."""
    _write_json(run_dir / INFO_FILE, {**(_read_json(run_dir / INFO_FILE) or {}), **changes})


def record_resume(run_dir: Path, config: Config, registry: Registry, argv: Sequence[str], changed: Sequence[str]) -> None:
    """Note a resume in ``run.json``, with its versions and allowed changes."""
    facts = _facts(config, registry, argv, datetime.now().astimezone())
    earlier = (_read_json(run_dir / INFO_FILE) or {}).get("resumed", [])
    entry = {key: facts[key] for key in ("started", "argv", "git", "python", "versions")} | {"changed": list(changed)}
    record(run_dir, {"status": "running", "resumed": [*earlier, entry]})


def changed_versions(run_dir: Path, config: Config, registry: Registry) -> list[str]:
    """List packages of another version than before: ``name: old → new``.

    That is since the run last continued.
    """
    facts = _read_json(run_dir / INFO_FILE) or {}
    old = (facts.get("resumed") or [facts])[-1].get("versions", {})
    new = _versions(config, registry)
    return [f"{name}: {old[name]} → {new.get(name, 'not installed')}" for name in old if old[name] != new.get(name)]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path)
    except FileError:
        return None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(value, indent=2) + "\n")


def is_run_dir(path: Path) -> bool:
    """Return True if ``path`` holds a run."""
    return (path / CONFIG_FILE).is_file()


def runs_in(folder: Path) -> list[str]:
    """List the names of runs in a folder."""
    return sorted(path.name for path in folder.iterdir() if is_run_dir(path)) if folder.is_dir() else []


def remove_unused(run_dir: Path) -> None:
    """Remove a run in which nothing was trained."""
    if not any((run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "model")):
        shutil.rmtree(run_dir, ignore_errors=True)


def name_of(run_dir: Path) -> str | None:
    """Read a run's own ``run.name``, if it had one."""
    return _snapshot(run_dir).get("run", {}).get("name")


def _snapshot(run_dir: Path) -> dict[str, Any]:
    try:
        return read_snapshot(run_dir / CONFIG_FILE)
    except WMTPError as error:
        raise FileError(f"{error}; the run cannot be resumed") from None


@frozen(kw_only=True)
class Differences:
    """Differences from a run's own config, as ``key: old → new``.

    Args:
        refused: a resume may not make them.
        altering: it may, and later steps are computed otherwise.
        free: they change nothing that is computed.
    """

    refused: Sequence[str]
    altering: Sequence[str]
    free: Sequence[str]


def differences(run_dir: Path, config: Config) -> Differences:
    """Compare ``config`` with the run's own.

    Raises:
        WMTPError: the run's ``config.toml`` is damaged.
    """
    old = flat(_snapshot(run_dir))
    new = flat(to_mapping(fixed(run_dir, config), text=escape))
    given = given_inputs(run_dir)
    elsewhere = {one.key for one in inputs(config) if given.get(one.key) == one.uri}  # the same words in another folder
    # their checkpoints hold the same fp32 copies: a run in fp8 goes on where no GPU has it
    precisions = {str(values.get("devices.precision")) for values in (old, new)}
    is_other_bf16 = precisions == {"bf16-params", "fp8"}
    refused: list[str] = []
    altering: list[str] = []
    free: list[str] = []
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            line = f"{key}: {_shown(old, key)} → {_shown(new, key)}"
            is_free = key in elsewhere or is_free_to_change(key) or (key in LENGTH and not decays(config.schedule))
            is_altering = is_other_bf16 and _OF_PRECISION.fullmatch(key)
            (free if is_free else altering if is_altering else refused).append(line)
    return Differences(refused=refused, altering=altering, free=free)


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not set"
    return json.dumps(values[key], ensure_ascii=False, default=str)


def find_unfinished(config: Config) -> Path | None:
    """Find the newest unfinished, unnamed run with this config."""
    parent = file_path(config.run.output_dir)
    found: list[tuple[str, int, Path]] = []
    for path in parent.iterdir() if parent.is_dir() else ():
        facts = _read_json(path / INFO_FILE)
        if facts is None or facts.get("named") is not False or facts.get("status") in ("finished", "stopped"):
            continue
        try:
            found_other = differences(path, config)
        except WMTPError:
            continue
        if not (found_other.refused or found_other.altering):
            found.append((str(facts.get("started")), (path / INFO_FILE).stat().st_mtime_ns, path))
    return max(found)[2] if found else None


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Lock the run directory for this process.

    The system frees it however the process ends.

    Raises:
        ConfigError: another process holds it.
    """
    path = run_dir / _LOCK_FILE
    with FileLock(path) as held:
        try:
            is_held = held.acquire(wait=False)
            holder = "" if is_held else path.read_text(encoding="utf-8").strip()
            if is_held:
                path.write_text(f"process {os.getpid()} on {platform.node() or 'this machine'}\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{run_dir}: cannot be written to: {error.strerror}") from None
        if not is_held:
            raise ConfigError(
                f"{run_dir}: another process is running there ({holder or 'unknown'}); wait for it, or choose another name with"
                " --run-name"
            )
        yield

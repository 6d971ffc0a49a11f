"""Records of launches from this machine, so that none is started twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from wmtp.config.schema import Config
from wmtp.config.tree import plain_value
from wmtp.errors import ConfigError, WMTPError
from wmtp.json_files import DAMAGE, writing
from wmtp.runs.directory import git
from wmtp.storage.atomic import replace_text
from wmtp.storage.lock import FileLock

if TYPE_CHECKING:
    from wmtp.launchers.base import LaunchPlan

__all__ = ["Record", "add", "records", "remove", "state_dir", "submitting"]


@frozen(kw_only=True)
class Record:
    """One launch.

    Args:
        launcher: the ``type`` of the launcher.
        settings: the launcher's table, with its ``type``.
        digest: `LaunchPlan.digest`.
        sha256: of `LaunchPlan.text`.
        name: ``run.name``.
        submitted: when.
        git: the commit of the folder that it was launched from.
        details: `LaunchPlan.record`.
        run: the service's id; None while it is not known whether the service got the request.
    """

    launcher: str
    settings: Mapping[str, Any]
    digest: str
    sha256: str
    name: str | None
    submitted: str
    git: Mapping[str, Any] | None
    details: Mapping[str, str | None] = field(factory=dict)
    run: str | None = None

    @classmethod
    def of(cls, config: Config, plan: LaunchPlan) -> Record:
        """Make the record of a launch that is about to be sent."""
        return cls(
            launcher=config.launcher.type,
            settings=plain_value(config.launcher, is_component=True),
            digest=plan.digest,
            sha256=hashlib.sha256(plan.text.encode()).hexdigest(),
            name=config.run.name,
            submitted=datetime.now().astimezone().isoformat(timespec="seconds"),
            git=git(),
            details=dict(plan.record),
        )

    def named(self, run: str) -> Record:
        """Copy the record with the id that the service gave the run."""
        return evolve(self, run=run)


def state_dir() -> Path:
    """Return the folder of launch records.

    ``$WMTP_STATE_DIR``, else ``wmtp`` in the user's folder for state (XDG).
    """
    if own := os.environ.get("WMTP_STATE_DIR"):
        return Path(own).expanduser() / "launches"
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "wmtp" / "launches"


def _path(record: Record) -> Path:
    word = f"pending-{record.digest[:16]}" if record.run is None else record.run
    return state_dir() / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', f'{record.launcher}-{word}')}.json"


def add(record: Record) -> None:
    """Keep a record.

    Raises:
        WMTPError: it cannot be written.
    """
    path = _path(record)
    values = {key: getattr(record, key) for key in Record.__annotations__}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(values, indent=2) + "\n")


def remove(record: Record) -> None:
    """Forget a record."""
    _path(record).unlink(missing_ok=True)


def records() -> list[Record]:
    """Read this machine's launch records, the newest first.

    A damaged file is passed over.
    """
    found: list[Record] = []
    for path in state_dir().glob("*.json") if state_dir().is_dir() else ():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found.append(Record(**{key: values[key] for key in Record.__annotations__}))
        except (OSError, *DAMAGE):
            continue
    return sorted(found, key=lambda record: record.submitted, reverse=True)


@contextmanager
def submitting(plan: LaunchPlan) -> Iterator[None]:
    """Lock the submission of a plan.

    Two commands at once would start two runs.

    Raises:
        ConfigError: another process holds it.
        WMTPError: the folder of records cannot be written to.
    """
    path = state_dir() / f".{plan.digest[:16]}.lock"
    with FileLock(path) as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_held = held.acquire(wait=False)
        except OSError as error:
            raise WMTPError(f"{path} could not be written: {error.strerror or error}") from None
        if not is_held:
            raise ConfigError("another wmtp launch is submitting this very plan; wait for its answer")
        yield

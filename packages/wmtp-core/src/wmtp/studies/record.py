"""Small files, one for each run that has ended.

Enough for tables, the page, and continuing elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import asdict, field, frozen
from attrs.validators import instance_of

from wmtp.errors import FileError
from wmtp.json_files import read_json_object, writing
from wmtp.runs.directory import is_free_to_change
from wmtp.storage.atomic import replace_text
from wmtp.studies.plan import PlannedRun, counted

__all__ = ["FAILED", "RunRecord", "changed_keys", "of_plan", "read_records", "remove_record", "write_record"]

#: a way on, where a record is damaged
_REMOVE: Final = "remove it: where the run's folder is here it is read again, else the run is done again"
#: status of a run that ended with an error
FAILED: Final = "failed"


@frozen(kw_only=True)
class RunRecord:
    """Numbers, curves and texts of a run, without its weights.

    Args:
        name: of its directory.
        arm: name of its arm.
        seed: its seed.
        key: see `wmtp.studies.plan.PlannedRun`.
        status: ``finished``, ``stopped`` by early stopping, or ``failed``.
        error: why it failed.
        steps: optimizer steps done.
        tokens: that were read in them.
        seconds: from start to end, over all resumes.
        metrics: the last value of every metric; None for one that was not finite.
        data: digests of the training and the evaluation data.
        versions: of what decides the result.
        device: what it was trained on.
        page: what `wmtp.reporting` shows of it.
    """

    name: str = field(validator=instance_of(str))
    arm: str = field(validator=instance_of(str))
    seed: int = field(validator=instance_of(int))
    key: str = field(validator=instance_of(str))
    status: str = field(validator=instance_of(str))
    error: str | None = None
    steps: int = field(default=0, validator=instance_of(int))
    tokens: float = field(default=0.0, validator=instance_of((int, float)))
    seconds: float = field(default=0.0, validator=instance_of((int, float)))
    metrics: Mapping[str, float | None] = field(factory=dict, validator=instance_of(Mapping))
    data: Mapping[str, str | None] = field(factory=dict, validator=instance_of(Mapping))
    versions: Mapping[str, str] = field(factory=dict, validator=instance_of(Mapping))
    device: str | None = None
    page: Mapping[str, Any] = field(factory=dict, validator=instance_of(Mapping))

    @property
    def counts(self) -> bool:
        """True for a run that ended well and can be compared."""
        return self.status != FAILED

    def value(self, metric: str) -> float | None:
        """Return a metric's value where it is finite, else None."""
        value = self.metrics.get(metric)
        return None if value is None or not math.isfinite(value) else value

    def matches(self, run: PlannedRun) -> bool:
        """Tell whether this is what a planned run would compute."""
        return self.key == run.key


def write_record(folder: Path, record: RunRecord) -> None:
    """Write the record of a run, in place of an earlier one.

    Raises:
        WMTPError: it cannot be written.
    """
    path = _path(folder, record.name)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(_finite(asdict(record)), separators=(",", ":"), default=str) + "\n")


def remove_record(folder: Path, name: str) -> None:
    """Forget how a run ended: it will be run again."""
    _path(folder, name).unlink(missing_ok=True)


def _path(folder: Path, name: str) -> Path:
    return folder / "record" / f"{name}.json"


def _finite(value: Any) -> Any:
    """Replace what is not finite by None, as JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(folder: Path) -> dict[str, RunRecord]:
    """Read the records of a study, by name of the run.

    Raises:
        WMTPError: a file is damaged; the message names it.
    """
    found: dict[str, RunRecord] = {}
    for path in sorted((folder / "record").glob("*.json")):
        values = read_json_object(path, _REMOVE)
        try:
            record = found[path.stem] = RunRecord(**values)
        except TypeError as error:
            raise FileError(f"{path}: is no record of a run ({error.args[0]}); {_REMOVE}") from None
        if record.name != path.stem:
            raise FileError(f"{path}: is a copy of the record of {record.name!r}; remove it, or call it {record.name}.json")
    return found


def of_plan(records: Mapping[str, RunRecord], runs: Iterable[PlannedRun]) -> tuple[dict[str, RunRecord], Sequence[RunRecord]]:
    """Divide records into those that count, and others.

    The latter are of no planned run, since the study was edited.
    """
    planned = {run.name: run for run in runs}
    counted = {name: one for name, one in records.items() if name in planned and one.matches(planned[name])}
    return counted, [one for name, one in records.items() if name not in counted]


def changed_keys(record: RunRecord, runs: Iterable[PlannedRun]) -> list[str]:
    """Name the keys in which a run differs from its plan.

    The planned run is that of the same arm and seed.
    """
    planned = next((run for run in runs if (run.arm, run.seed) == (record.arm, record.seed)), None)
    before = record.page.get("config")
    if planned is None or not isinstance(before, Mapping):
        return []
    now = {key: value if isinstance(value, str) else json.dumps(value) for key, value in counted(planned.config).items()}
    was = {key: value for key, value in before.items() if key in now or not (key == "run.name" or is_free_to_change(key))}
    return [key for key in now | was if not _same(was.get(key), now.get(key))]


def _same(was: Any, now: str | None) -> bool:
    """Compare two values; a path may be absolute in one.

    Perhaps that of another machine. The model of a run is the same in any study's folder: its name has the key of the run.
    """
    if not was or not now:
        return was == now
    ends = [str(value).split("/")[-3:] for value in (was, now)]
    model = len(ends[0]) == 3 and ends[0][0] == "runs" and ends[0][2] == "model" and ends[0] == ends[1]
    return was == now or model or str(was).endswith(f"/{now}") or str(now).endswith(f"/{was}")

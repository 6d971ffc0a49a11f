"""Records of runs, made from their directories."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from wmtp.reporting.collect import collect
from wmtp.runs.files import DOCUMENTS_FILE, read_info, read_object
from wmtp.runs.step_file import read_steps
from wmtp.studies.plan import PlannedRun
from wmtp.studies.record import FAILED, RunRecord

__all__ = ["record_failure", "record_of"]

_CURVE_POINTS: Final = 100
#: documents of a record, and how many tokens of each
_DOCUMENTS: Final = 2


def record_of(run_dir: Path, *, arm: str, seed: int, key: str = "", seconds: float | None = None) -> RunRecord | None:
    """Make the record of a run that ended well, else None.

    Args:
        run_dir: its directory.
        arm: name of its arm.
        seed: its seed.
        key: see `RunRecord`.
        seconds: that it took; default: as ``run.json`` has it.

    Raises:
        WMTPError: a file of the run is damaged.
    """
    info = read_info(run_dir)
    if info.get("status") not in ("finished", "stopped"):
        return None
    steps = read_steps(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    last: dict[str, float] = {}
    for line in steps:
        last |= {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    page = collect(run_dir)
    last |= {name: value for name, value in page["evaluation"].items() if isinstance(value, int | float)}
    read = [line["tokens"] for line in steps if "tokens" in line]
    done = int(steps[-1]["step"]) if steps else 0
    return RunRecord(
        name=run_dir.name,
        arm=arm,
        seed=seed,
        key=key,
        status=str(info["status"]),
        steps=done,
        tokens=sum(read) / len(read) * done if read else 0.0,
        seconds=round(seconds if seconds is not None else _seconds(info), 3),
        metrics=last,
        data=info.get("data") or {},
        versions=info.get("versions") or {},
        device=info.get("device"),
        page=_small(page) | ({"documents": documents} if (documents := read_object(run_dir / DOCUMENTS_FILE)) else {}),
    )


def record_failure(run: PlannedRun, error: str, seconds: float) -> RunRecord:
    """Make the record of a run that failed."""
    return RunRecord(
        name=run.name, arm=run.arm, seed=run.seed, key=run.key, status=FAILED, error=error, seconds=round(seconds, 3)
    )


def _seconds(info: Mapping[str, Any]) -> float:
    """Seconds from the last start to the end.

    0 where they are not known: a clock that was set back meanwhile does not tell.
    """
    started = (info.get("resumed") or [info])[-1].get("started")
    try:
        found = (datetime.fromisoformat(str(info["ended"])) - datetime.fromisoformat(str(started))).total_seconds()
    except (KeyError, TypeError, ValueError):
        return 0.0
    return max(found, 0.0)


def _small(page: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what a study's page shows: losses and last texts."""
    curves = {}
    for name, (steps, values) in page["curves"].items():
        if name.startswith(("eval/loss", "loss")):
            every = max(1, -(-len(steps) // _CURVE_POINTS))
            kept = sorted({*range(0, len(steps), every), len(steps) - 1})
            curves[name] = ([steps[i] for i in kept], [values[i] for i in kept])
    samples = [{**record, "documents": record["documents"][:_DOCUMENTS]} for record in page["samples"][-1:]]
    kept = {key: page[key] for key in ("name", "status", "config", "stages", "evaluation", "estimates")}
    here = f"{os.getcwd()}{os.sep}"  # on another machine the study is elsewhere
    kept["config"] = {key: value.removeprefix(here) for key, value in page["config"].items()}
    return {**kept, "curves": curves, "samples": samples}

"""Report contents of one run, read from its directory and thinned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from wmtp.config.tree import flat
from wmtp.json_files import reading
from wmtp.runs.directory import CONFIG_FILE
from wmtp.runs.files import SAMPLE_FILE, read_info, read_object, read_snapshot
from wmtp.runs.step_file import read_steps

__all__ = ["collect"]

#: points of one curve: the lowest and the highest of each of half as many stretches, so that no spike is lost
_POINTS: Final = 800
#: columns of the picture of how weights are distributed
_COLUMNS: Final = 160
#: characters of the texts of one run, as JSON
_TEXT_BUDGET: Final = 1_500_000


def collect(run_dir: Path, *, status: str | None = None) -> dict[str, Any]:
    """Collect one run's data for ``report.js``, as JSON.

    Args:
        run_dir: a run directory, in any state.
        status: replaces the status in ``run.json``.

    Raises:
        FileError: one of its files is damaged.
    """
    info = read_info(run_dir)
    config = read_snapshot(run_dir / CONFIG_FILE)
    metrics = _steps(run_dir / "metrics.jsonl")
    details, weights = run_dir / "evaluation-details.json", run_dir / "weights.jsonl"
    with reading(run_dir / CONFIG_FILE):  # the other two are what they should be
        facts = _facts(run_dir, info, config, metrics)
    with reading(run_dir / "metrics.jsonl"):
        curves, stages = _curves(metrics), _stages(metrics)
    with reading(details):
        estimates = _estimates(read_object(details))
    with reading(weights):
        distributions = _distributions(_steps(weights))
    return {
        "name": run_dir.name,
        "status": status or info.get("status", "unknown"),
        "facts": facts,
        "config": {key: _word(value) for key, value in flat(config).items()},
        "curves": curves,
        "stages": stages,
        "evaluation": read_object(run_dir / "evaluation.json"),
        "estimates": estimates,
        "weights": distributions,
        "sample": read_object(run_dir / SAMPLE_FILE),
        "samples": _thinned(_steps(run_dir / "samples.jsonl")),
    }


def _estimates(details: dict[str, Any]) -> dict[str, Any]:
    """Confidence interval and sample size of each evaluation result that has one."""
    return {
        f"{kind}/{name}": {key: result[key] for key in ("low", "high", "n", "unit")}
        for kind, measured in details.items()
        for name, result in measured["results"].items()
        if "low" in result
    }


def _steps(path: Path) -> list[dict[str, Any]]:
    return read_steps(path) if path.exists() else []


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _facts(
    run_dir: Path, info: Mapping[str, Any], config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Collect the facts that a reader wants first, in display order."""
    last: dict[str, Any] = {}
    for line in metrics[-1:]:
        last = dict(line)
    base = config.get("models", {}).get("base", {})
    heads, train, data = base.get("heads", {}), config.get("train", {}), config.get("data", {}).get("train", {})
    datasets = config.get("datasets", {})
    facts: dict[str, Any] = {
        "trainer": _component(config.get("trainer", {})),
        "model": _component(base),
        "heads": f"{heads['horizon']}, {heads.get('kind')}" if "horizon" in heads else None,
        "data": ", ".join(
            f"{name} ({_component(datasets[name])})" for name in data.get("sources", datasets) if name in datasets
        ),
        "batch": f"{data.get('batch_size')} rows of {data.get('max_length')} tokens",
        "steps": f"{last['step']:,}" if last else "none yet",
        "planned": f"{train['max_steps']:,} steps" if "max_steps" in train else None,
        "seed": info.get("seed"),
        "started": _moment(info.get("started")),
        "ended": _moment(info.get("ended")),
        "last step written": _moment_of(run_dir / "metrics.jsonl") if info.get("status") == "running" else None,
        "resumed": f"{len(info['resumed'])}×" if info.get("resumed") else None,
        "speed": f"{_median([line.get('tokens_per_second') for line in metrics]):,.0f} tokens/s" if metrics else None,
        "peak memory": f"{last['peak_memory_gib']:.2f} GiB" if isinstance(last.get("peak_memory_gib"), float) else None,
        "command": " ".join(["wmtp", *map(str, info["argv"][1:])]) if info.get("argv") else None,
        "git": _commit(info.get("git")),
        "versions": ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items()),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _component(table: Mapping[str, Any]) -> str:
    of = table.get("of")
    kind = str(table.get("type", "?"))
    if isinstance(of, dict):
        return f"{kind} of {_component(of)}"
    return f"{kind} {table['uri']}" if "uri" in table else kind


def _moment(text: Any) -> str | None:
    try:
        return f"{datetime.fromisoformat(str(text)):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return None


def _moment_of(path: Path) -> str | None:
    return f"{datetime.fromtimestamp(path.stat().st_mtime).astimezone():%Y-%m-%d %H:%M:%S}" if path.exists() else None


def _commit(git: Any) -> str | None:
    if not isinstance(git, dict):
        return None
    return f"{str(git.get('commit'))[:12]}{', with changes' if git.get('changed') else ''}"


def _median(values: Sequence[Any]) -> float:
    known = sorted(value for value in values if isinstance(value, int | float))
    return known[len(known) // 2] if known else 0.0


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Metric → its steps and values, thinned out."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            steps, values = curves.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
    return {name: _thin_curve(steps, values) for name, (steps, values) in curves.items()}


def _thin_curve(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    count = len(steps)
    kept: Sequence[int] = range(count)
    if count > _POINTS:
        chosen = {0, count - 1}
        stretches = _POINTS // 2
        for number in range(stretches):
            inside = range(number * count // stretches, (number + 1) * count // stretches)
            chosen |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
        kept = sorted(chosen)
    return [steps[i] for i in kept], [float(f"{values[i]:.5g}") for i in kept]


def _stages(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Name of each stage, with its first logged step."""
    found: list[tuple[str, int]] = []
    for line in metrics:
        name = line.get("stage")
        if isinstance(name, str) and (not found or found[-1][0] != name):
            found.append((name, line["step"]))
    return found


def _distributions(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[list[int]]]]:
    """Count each head's predictions by weight bin, at some steps.

    Neighbouring steps are added up.
    """
    size = math.ceil(len(records) / _COLUMNS) or 1
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    return [
        (
            group[0]["step"],
            [[sum(bins) for bins in zip(*heads, strict=True)] for heads in zip(*(r["counts"] for r in group), strict=True)],
        )
        for group in groups
    ]


def _thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop every second text record until they fit.

    The first and the last stay.
    """
    sizes = [len(json.dumps(record)) for record in records]
    while sum(sizes) > _TEXT_BUDGET and len(records) > 2:
        kept = [i for i in range(len(records)) if i % 2 == 0 or i == len(records) - 1]
        records, sizes = [records[i] for i in kept], [sizes[i] for i in kept]
    return records

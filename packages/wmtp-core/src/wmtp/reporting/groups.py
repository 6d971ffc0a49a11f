"""Runs that differ only in their seed, as a study's arms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp.config.tree import flat
from wmtp.reporting.records import record_of
from wmtp.reporting.study import study_page
from wmtp.runs.directory import is_free_to_change
from wmtp.runs.files import CONFIG_FILE, read_snapshot
from wmtp.studies.record import RunRecord
from wmtp.studies.table import Compared, compare, measured

__all__ = ["grouped_page"]


def grouped_page(folders: Sequence[Path]) -> str | None:
    """Build the page of runs that differ in ``run.seed`` alone.

    None where no two do, or one has not ended.

    Args:
        folders: run directories.

    Raises:
        WMTPError: a file of a run is damaged.
    """
    configs = [flat(read_snapshot(folder / CONFIG_FILE)) for folder in folders]
    groups: dict[str, list[int]] = {}
    for number, config in enumerate(configs):
        groups.setdefault(json.dumps(_decisive(config), sort_keys=True, default=str), []).append(number)
    if len(groups) == len(folders):
        return None
    names = _names([_decisive(configs[numbers[0]]) for numbers in groups.values()])
    records: list[RunRecord] = []
    arms: list[Compared] = []
    baseline = next((name for name in names if name.split()[0] == "baseline-mtp"), names[0])
    for name, numbers in zip(names, groups.values(), strict=True):
        seeds = [int(configs[number].get("run.seed", 0)) for number in numbers]
        if len(set(seeds)) < len(seeds):
            return None  # the same run twice is no two seeds
        arms.append(Compared(name=name, baseline=baseline, seeds=seeds))
        for number, seed in zip(numbers, seeds, strict=True):
            if (record := record_of(folders[number], arm=name, seed=seed)) is None:
                return None
            records.append(record)
    return study_page(f"{len(folders)} runs", baseline, compare(arms, records, measured(records)), records)


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out what changes no result, and the seed."""
    return {key: value for key, value in config.items() if key not in ("run.seed", "run.name") and not is_free_to_change(key)}


def _names(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Name groups by trainer, and by the settings in which namesakes differ."""
    trainers = [str(config.get("trainer.type", "?")) for config in configs]
    names = []
    for config, trainer in zip(configs, trainers, strict=True):
        alike = [other for other, its in zip(configs, trainers, strict=True) if its == trainer]
        keys = [key for key in config if any(other.get(key) != config[key] for other in alike)]
        names.append(" ".join([trainer, *(f"{key.rpartition('.')[2]}={config[key]}" for key in keys)]))
    return names

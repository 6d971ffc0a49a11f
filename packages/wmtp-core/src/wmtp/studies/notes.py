"""Notes under a study's table: what makes its runs hard to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from wmtp.studies.documents import paired_over_documents
from wmtp.studies.record import RunRecord

if TYPE_CHECKING:
    from wmtp.studies.table import Compared, Row

__all__ = ["differences", "missing_seeds", "mixtures", "not_finite", "other_seeds", "over_documents", "within_runs"]

_OF_DATA: Final[Mapping[str, Callable[[RunRecord], Any]]] = {
    "training data": lambda run: run.data.get("train"),
    "evaluation data": lambda run: run.data.get("eval"),
}
_OF_MACHINES: Final[Mapping[str, Callable[[RunRecord], Any]]] = {
    "device": lambda run: run.device,
    "versions": lambda run: tuple(sorted(run.versions.items())),
}
_FACTS: Final[Mapping[str, Callable[[RunRecord], Any]]] = {
    "optimizer steps": lambda run: run.steps,
    "tokens read": lambda run: round(run.tokens),
    **_OF_DATA,
    **_OF_MACHINES,
}


def differences(
    arms: Sequence[Compared], found: Mapping[str, Mapping[int, RunRecord]], named: Sequence[tuple[str, str, str]]
) -> list[str]:
    """Say what else differs between runs that are compared."""
    notes = []
    compared = [(arm.name, arm.baseline) for arm in arms if arm.baseline not in (None, arm.name)]
    for name, to in dict.fromkeys([*compared, *((name, to) for name, to, _ in named)]):
        pairs = [(run, found[to].get(seed)) for seed, run in found[name].items()]
        facts: dict[tuple[int, ...], list[str]] = {}  # by the seeds that they are of
        for fact, read in _FACTS.items():
            unlike = [(run, other) for run, other in pairs if other is not None and read(run) != read(other)]
            if not unlike:
                continue
            run, other = unlike[0]
            shown = f": {read(run):,} and {read(other):,}" if isinstance(read(run), int) else ""
            facts.setdefault(tuple(run.seed for run, _ in unlike), []).append(f"{fact}{shown}")
        notes += [f"{name} and {to} differ in {'; '.join(which)} (seed {_numbers(seeds)})" for seeds, which in facts.items()]
    return notes


def mixtures(found: Mapping[str, Mapping[int, RunRecord]]) -> list[str]:
    """Name arms whose seeds have other data, or another machine.

    Each comparison may be fair, seed by seed, while a mean is of both.
    """
    mixed: dict[tuple[str, tuple[tuple[int, ...], ...]], list[str]] = {}
    for arm, runs in found.items():
        of_data = {} if any(_draws_its_data(run) for run in runs.values()) else _OF_DATA
        for fact, read in {**of_data, **_OF_MACHINES}.items():
            groups: dict[Any, list[int]] = {}
            for seed in sorted(runs):
                groups.setdefault(read(runs[seed]), []).append(seed)
            if len(groups) > 1:
                mixed.setdefault((fact, tuple(map(tuple, groups.values()))), []).append(arm)
    return [
        f"{_names(arms)} {'has' if len(arms) == 1 else 'have'} runs that differ in {fact}: "
        f"{' from '.join(f'seed {_numbers(seeds)}' for seeds in groups)}; their means are of both"
        for (fact, groups), arms in mixed.items()
    ]


def _draws_its_data(run: RunRecord) -> bool:
    """Tell whether the seed chooses documents, as a holdout's does.

    Or whether that is not known.
    """
    config = run.page.get("config")
    return not isinstance(config, Mapping) or "data.eval.holdout" in config


def missing_seeds(arms: Sequence[Compared], found: Mapping[str, Mapping[int, RunRecord]]) -> list[str]:
    """Name the arms that lack runs, those with the same seeds together."""
    notes = []
    missing: dict[tuple[int, ...], list[str]] = {}
    for arm in arms:
        if lacking := tuple(seed for seed in arm.seeds if seed not in found[arm.name]):
            missing.setdefault(lacking, []).append(arm.name)
    for lacking, names in missing.items():
        notes.append(f"{_names(names)} {'has' if len(names) == 1 else 'have'} no finished run with seed {_numbers(lacking)}")
    if arms and max(len(arm.seeds) for arm in arms) == 1:
        notes.append("every arm has one seed: nothing can be said of chance, so there is no interval; add seeds")
    return notes


def other_seeds(
    arms: Sequence[Compared], found: Mapping[str, Mapping[int, RunRecord]], named: Sequence[tuple[str, str, str]]
) -> list[str]:
    """Name compared arms that are meant to have other seeds.

    Their difference is of the common ones, and their means are not.
    """
    seeds = {arm.name: set(arm.seeds) for arm in arms}
    pairs = [(arm.name, arm.baseline) for arm in arms if arm.baseline not in (None, arm.name)]
    notes = []
    for name, to in dict.fromkeys([*pairs, *((name, to) for name, to, _ in named)]):
        common = sorted(found[name].keys() & found[to].keys())
        if common and seeds[name] != seeds[to]:
            notes.append(
                f"{name} and {to} have other seeds: their difference is over seed {_numbers(common)}, their means over all"
            )
    return notes


def not_finite(metrics: Sequence[str], found: Mapping[str, Mapping[int, RunRecord]]) -> list[str]:
    """Name the values that are left out since they are no numbers."""
    notes = []
    for metric in metrics:
        for arm, runs in found.items():
            bad = [seed for seed, run in runs.items() if metric in run.metrics and run.value(metric) is None]
            if bad:
                notes.append(f"{metric} of {arm} is not finite and left out (seed {_numbers(bad)})")
    return notes


def over_documents(rows: Iterable[Row], found: Mapping[str, Mapping[int, RunRecord]]) -> list[str]:
    """Describe how far other texts would move named comparisons.

    Where runs have losses by document.
    """
    notes = []
    for row in rows:
        if row.kind != "named" or row.to is None:
            continue
        first, second = found[row.arm], found.get(row.to, {})
        estimate = paired_over_documents(row.metric, first, second, [seed for seed in first if seed in second])
        if estimate is not None:
            value, low, high, documents = estimate
            notes.append(
                f"{row.arm} − {row.to} in {row.metric}: {value:+.4g} [{low:+.4g}, {high:+.4g}] by a paired bootstrap over "
                f"{documents} documents, these runs as they are"
            )
    return notes


def within_runs(metrics: Sequence[str], records: Sequence[RunRecord]) -> list[str]:
    """Describe how far other evaluation data would move a number.

    Where an evaluator has measured that.
    """
    notes = []
    for metric in metrics:
        estimates = [found for record in records if (found := record.page.get("estimates", {}).get(metric)) is not None]
        if estimates:
            half = fmean((found["high"] - found["low"]) / 2 for found in estimates)
            number, unit = estimates[0]["n"], estimates[0]["unit"]
            notes.append(f"{metric}: within a run ±{half:.2g}, by a bootstrap over {number} {unit}; arms share them")
    return notes


def _numbers(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

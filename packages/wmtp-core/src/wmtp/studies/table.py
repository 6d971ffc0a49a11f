"""Table of a study: means, spreads, and paired differences with intervals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Final

from attrs import asdict, evolve, frozen

from wmtp.config.problems import dotted
from wmtp.errors import ConfigError
from wmtp.spelling import did_you_mean
from wmtp.studies.metrics import is_metric, named_metrics
from wmtp.studies.notes import differences, missing_seeds, mixtures, not_finite, other_seeds, over_documents, within_runs
from wmtp.studies.plan import Arm, StudyPlan
from wmtp.studies.record import RunRecord
from wmtp.studies.statistics import holm, paired_difference

__all__ = ["Compared", "Row", "StudyTable", "as_dicts", "compare", "make_table", "measured"]

_LEVEL: Final = 0.05
_LOWER_IS_BETTER: Final = re.compile(r"(^|/)(loss|perplexity)(/|$)")
_HIGHER_IS_BETTER: Final = re.compile(r"(^|/)(token-accuracy|pass-at-k|pass@\d+|accepted)")


@frozen(kw_only=True)
class Row:
    """One arm and one metric.

    Args:
        metric: its name.
        arm: name of the arm.
        n: runs.
        mean: over the runs.
        sd: standard deviation; None for one run.
        to: the arm that it is compared to; None for the baseline itself.
        difference: mean of this arm minus the other, over seeds that both have.
        low: lower end of the 95 % interval of the difference, by Student's t over seeds; None for one seed.
        high: its upper end.
        p: two-sided; of a named comparison corrected by Holm.
        pairs: seeds that both arms have.
        kind: ``named`` before the result was known, ``exploratory``, or ``baseline``.
        verdict: in words.
    """

    metric: str
    arm: str
    n: int
    mean: float
    sd: float | None
    to: str | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    pairs: int = 0
    kind: str = "baseline"
    verdict: str = ""


@frozen(kw_only=True)
class StudyTable:
    """Findings of a study.

    Args:
        rows: by metric, then by arm.
        metrics: in order; the first one is the study's main one.
        notes: what makes runs hard to compare, one line each.
        seeds: of the runs that count.
        lacking: of the notes, those of metrics that the study names and no finished run has.
    """

    rows: Sequence[Row]
    metrics: Sequence[str]
    notes: Sequence[str]
    seeds: Sequence[int]
    lacking: Sequence[str] = ()

    @property
    def headline(self) -> Row | None:
        """First named comparison, else the main metric's largest difference."""
        named = [row for row in self.rows if row.kind == "named"]
        if named:
            return named[0]
        others = [row for row in self.rows if row.metric in self.metrics[:1] and row.difference is not None]
        return max(others, key=lambda row: abs(row.difference or 0.0), default=None)

    def sentence(self) -> str:
        """Say the headline in words."""
        row = self.headline
        if row is None or row.difference is None:
            what = "a finished run with the same seed" if self.metrics else "a finished run with a metric that is compared"
            return f"No two arms have {what} yet, so there is nothing to compare."
        if row.low is None or row.high is None:
            return (
                f"{row.arm} − {row.to} in {row.metric}: {row.difference:+.4g}, from one seed: no interval, so nothing can be"
                " said of chance."
            )
        return (
            f"{row.arm} − {row.to} in {row.metric}: {row.difference:+.4g} (95 % interval {row.low:+.4g} to {row.high:+.4g},"
            f" {row.pairs} seeds): {row.verdict}."
        )


@frozen(kw_only=True)
class Compared:
    """One arm, and what it is compared to.

    Args:
        name: of the arm.
        baseline: of the arm that it is compared to; None for none.
        seeds: that it should have runs of.
    """

    name: str
    baseline: str | None
    seeds: Sequence[int]


def make_table(plan: StudyPlan, records: Mapping[str, RunRecord]) -> StudyTable:
    """Compare the arms of a study.

    Args:
        plan: of the study.
        records: of its runs, by name.

    Raises:
        ConfigError: every arm has a run that has ended, and none has a metric that the study names.
    """
    known = {run.name for run in plan.runs}
    arms = [_compared_arm(plan, arm) for arm in plan.arms if arm.compared]
    counting = [record for record in records.values() if record.name in known]
    found = by_arm(arms, counting)
    finished = [run for runs in found.values() for run in runs.values()]
    metrics, lacking = _metrics(plan, finished, every_arm=all(found.values()))
    table = compare(arms, counting, metrics, [(arm.name, to.name, metric) for arm, to, metric in plan.comparisons])
    lacking = lacking if finished else []
    return evolve(table, notes=[*lacking, *table.notes], lacking=lacking)


def _compared_arm(plan: StudyPlan, arm: Arm) -> Compared:
    baseline = plan.baseline_of(arm)
    return Compared(name=arm.name, baseline=None if baseline is None else baseline.name, seeds=arm.seeds)


def by_arm(arms: Sequence[Compared], records: Iterable[RunRecord]) -> dict[str, dict[int, RunRecord]]:
    """Sort the records that count by arm and seed."""
    found: dict[str, dict[int, RunRecord]] = {arm.name: {} for arm in arms}
    for record in records:
        if record.counts and record.arm in found:
            found[record.arm][record.seed] = record
    return found


def compare(
    arms: Sequence[Compared], records: Sequence[RunRecord], metrics: Sequence[str], named: Sequence[tuple[str, str, str]] = ()
) -> StudyTable:
    """Compare arms by the records of their runs.

    Args:
        arms: in order.
        records: of their runs.
        metrics: what is compared.
        named: arm, other arm and metric of each comparison that was chosen before.
    """
    found = by_arm(arms, records)
    rows = [row for metric in metrics for row in _rows(arms, found, metric, named)]
    chosen = [row for row in rows if row.kind == "named" and row.p is not None]
    without = [1.0] * (len(named) - len(chosen))  # those that have no p yet belong to the family all the same
    corrected = dict(zip(map(id, chosen), holm([*(row.p or 0.0 for row in chosen), *without]), strict=False))
    rows = [evolve(row, p=corrected[id(row)]) if id(row) in corrected else row for row in rows]
    rows = [evolve(row, verdict=_verdict(row)) for row in rows]
    seeds = sorted({seed for runs in found.values() for seed in runs})
    notes = [
        *not_finite(metrics, found),
        *differences(arms, found, named),
        *mixtures(found),
        *missing_seeds(arms, found),
        *other_seeds(arms, found, named),
        *over_documents(rows, found),
        *within_runs(metrics, [run for runs in found.values() for run in runs.values()]),
    ]
    return StudyTable(rows=rows, metrics=list(metrics), notes=notes, seeds=seeds)


def _metrics(plan: StudyPlan, records: Sequence[RunRecord], *, every_arm: bool) -> tuple[list[str], list[str]]:
    """Choose the metrics to compare.

    With a note of each that was named and that no run has yet, an error once every arm has a run.
    """
    there = list(dict.fromkeys(name for record in records for name in record.metrics))
    own = plan.file.config.study.metrics
    chosen: dict[str, None] = dict.fromkeys(() if own else measured(records))
    lacking = []
    for pattern, path in named_metrics(plan.file.config).items():
        matching = [name for name in there if is_metric(name, pattern, plan.file.config)]
        hint = did_you_mean(pattern, there)
        if not matching:
            lacking.append(f"{dotted(path)}: no finished run has {pattern!r}{f'; {hint}' if hint else ''}")
        if not matching and every_arm:
            place = plan.file.document.source(path)
            where = place.where(path) if place is not None else None
            some = ", ".join(measured(records) or there)
            message = f"{dotted(path)}: no run has {pattern!r}; {hint or f'there is {some}'}"
            raise ConfigError(f"{where}: {message}" if where else message)
        chosen |= dict.fromkeys(matching)
    return list(chosen), lacking


def measured(records: Iterable[RunRecord]) -> list[str]:
    """Name every evaluation loss, head 1 first, and evaluators' numbers."""
    records = list(records)
    losses = list(dict.fromkeys(name for record in records for name in record.metrics if name.startswith("eval/loss")))
    losses.sort(key=lambda name: (name != "eval/loss/head_1", name))
    evaluated = dict.fromkeys(name for record in records for name in record.page.get("evaluation") or {})
    return losses + [name for name in evaluated if any(name in record.metrics for record in records)]


def _rows(
    arms: Sequence[Compared],
    found: Mapping[str, Mapping[int, RunRecord]],
    metric: str,
    named: Sequence[tuple[str, str, str]],
) -> list[Row]:
    values = {
        arm.name: {seed: value for seed, run in found[arm.name].items() if (value := run.value(metric)) is not None}
        for arm in arms
    }
    rows = []
    for arm in arms:
        own = values[arm.name]
        if not own:
            continue
        spread = stdev(own.values()) if len(own) > 1 else None
        row = Row(metric=metric, arm=arm.name, n=len(own), mean=fmean(own.values()), sd=spread)
        others = [(to, "named") for name, to, of in named if name == arm.name and of == metric]
        if arm.baseline is not None and arm.baseline not in [arm.name, *(to for to, _ in others)]:
            others.append((arm.baseline, "exploratory"))
        compared = [_compared(row, own, values[to], to, kind) for to, kind in others]
        rows += compared or [row]
    return rows


def _compared(row: Row, own: Mapping[int, float], other: Mapping[int, float], to: str, kind: str) -> Row:
    seeds = [seed for seed in own if seed in other]
    if not seeds:
        return evolve(row, to=to, kind=kind)
    found = paired_difference([own[seed] for seed in seeds], [other[seed] for seed in seeds])
    return evolve(row, to=to, kind=kind, difference=found.mean, low=found.low, high=found.high, p=found.p, pairs=found.n)


def _verdict(row: Row) -> str:
    if row.kind == "baseline":
        return ""
    if row.difference is None:
        return "no seed in common"
    if row.low is None or row.high is None:
        return "one seed: no interval"
    if row.low <= 0 <= row.high:
        return "no difference seen"
    if row.kind == "named" and row.p is not None and row.p >= _LEVEL:
        return "no difference seen after correction"
    word = "lower" if row.difference < 0 else "higher"
    if _LOWER_IS_BETTER.search(row.metric):
        word += ", better" if row.difference < 0 else ", worse"
    elif _HIGHER_IS_BETTER.search(row.metric):
        word += ", worse" if row.difference < 0 else ", better"
    return word if row.kind == "named" else f"{word} (exploratory)"


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Turn rows into plain mappings, in the order of their fields."""
    return [asdict(row) for row in rows]

"""Metrics that a study names, and those that no run has."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from wmtp.config.eval_metrics import eval_metric_problem, eval_metrics
from wmtp.config.problems import KeyPath, Problem, dotted
from wmtp.config.schema import Config
from wmtp.spelling import nearest
from wmtp.studies.config import StudyConfig

__all__ = ["is_metric", "metric_problems", "named_metrics", "odd_metrics"]

_ALMOST: Final = 0.85


def named_metrics(config: StudyConfig) -> dict[str, KeyPath]:
    """Say where a study names each of its metrics first."""
    places: dict[str, KeyPath] = dict.fromkeys(config.study.metrics, ("study", "metrics"))
    for index, comparison in enumerate(config.comparisons):
        if comparison.metric is not None:
            places.setdefault(comparison.metric, ("comparisons", index, "metric"))
    return places


def is_metric(name: str, pattern: str, config: StudyConfig) -> bool:
    """Tell whether the study names a metric, perhaps by a pattern."""
    return name == pattern or (pattern in config.study.metrics and fnmatch.fnmatchcase(name, pattern))


def metric_problems(config: StudyConfig, runs: Sequence[Config]) -> Iterator[Problem]:
    """Report metrics of ``[data.eval]`` that no compared run can have.

    What a trainer or an evaluator measures besides, only a run shows.
    """
    for pattern, path in named_metrics(config).items():
        if pattern.startswith("eval/") and not any(
            is_metric(name, pattern, config) for run in runs for name in eval_metrics(run)
        ):
            measured = [run for run in runs if run.data.eval is not None] or runs
            yield Problem(path, eval_metric_problem(pattern, measured[0]) or "no run has it")


def odd_metrics(config: StudyConfig, runs: Sequence[Config], evaluators: Collection[str]) -> Iterator[str]:
    """Warn of metrics that are likely to be misspelt, or not measured.

    A trainer may have one of that name: only the first run tells.

    Args:
        config: of the study.
        runs: a config of each compared arm.
        evaluators: types that are installed.
    """
    known = sorted({name for run in runs for name in eval_metrics(run)})
    labels = {label for run in runs for label in _labels(run)}
    for pattern, path in named_metrics(config).items():
        label, slash, _ = pattern.partition("/")
        if pattern.startswith("eval/"):
            continue
        if slash and label not in labels and re.sub(r"-\d+$", "", label) in evaluators:
            yield f"{dotted(path)}: {pattern!r}: no compared arm has the evaluator {label!r}; add it to [[eval]]"
        elif (meant := nearest(pattern, known, cutoff=_ALMOST)) is not None:
            yield f"{dotted(path)}: {pattern!r} is no metric that is known before a run is done; did you mean '{meant}'?"


def _labels(config: Config) -> Iterator[str]:
    """Name the evaluators of a run, as `wmtp.evaluation.measure.measure` does."""
    met: list[str] = []
    for evaluator in config.eval:
        met.append(evaluator.type)
        count = met.count(evaluator.type)
        yield evaluator.type if count == 1 else f"{evaluator.type}-{count}"

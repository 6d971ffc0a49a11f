"""A study file: arms, seeds, recipe, and the comparisons that count."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from attrs import Attribute, evolve, field, fields_dict, frozen
from attrs.validators import deep_iterable, ge, lt, max_len, min_len, optional

from wmtp.config.converter import make_converter
from wmtp.config.load import located
from wmtp.config.problems import KeyPath, Problem, Problems
from wmtp.config.schema import Config
from wmtp.config.sources import Document, MappingSource
from wmtp.config.toml_file import FileSource, TableSource
from wmtp.errors import ConfigError
from wmtp.plugins.loader import load_plugins
from wmtp.spelling import did_you_mean

__all__ = [
    "MOST_COMPARISONS",
    "OWN_KEYS",
    "ArmConfig",
    "ComparisonConfig",
    "StudyConfig",
    "StudyFile",
    "StudySection",
    "load_study",
    "overlaps",
]

#: named comparisons of a study: with more of them a correction hides what there is
MOST_COMPARISONS: Final = 4
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")


def _no_repeats(_: object, __: Attribute[Any], value: tuple[Any, ...] | None) -> None:
    if value is not None and len(set(value)) < len(value):
        raise ValueError("must hold every value once")


_SEEDS: Final[list[Callable[..., Any]]] = [min_len(1), deep_iterable([ge(0), lt(2**32)]), _no_repeats]


@frozen(kw_only=True)
class StudySection:
    """Name of a study, and settings of all its runs.

    Args:
        name: the study's folder is ``output_dir/name``.
        output_dir: where studies are kept.
        recipe: the TOML file, or files, that every arm begins with, seen from the study file; as for ``wmtp run``.
        seeds: ``run.seed`` of the runs of every arm. Differences between arms are taken seed by seed.
        baseline: the arm that the others are compared to.
        metrics: what is compared, as ``eval/loss/head_1``; the first is the one of comparisons that name none. Default:
            every loss of ``[data.eval]`` and every number of ``[[eval]]``.
        jobs: runs at once, each in a process of its own; with several GPUs each process has one.
        keep_models: false removes ``model/`` and ``checkpoints/`` of finished runs that no other run needs.
    """

    name: str
    output_dir: str = "studies"
    recipe: str | tuple[str, ...] | None = None
    seeds: tuple[int, ...] = field(validator=_SEEDS)
    baseline: str
    metrics: tuple[str, ...] = field(default=(), validator=_no_repeats)
    jobs: int = field(default=1, validator=ge(1))
    keep_models: bool = True


@frozen(kw_only=True)
class ArmConfig:
    """One arm: what it changes.

    Args:
        set: tables and keys laid over the recipe, as a file of their own would be. ``${arm:NAME}`` in a text is the model
            that the arm NAME has trained with the same seed, or with its only one: that arm is trained first.
        seeds: in place of ``study.seeds``.
        compared: false for an arm that is trained for others alone, as a reference: it is in no table.
        grid: false leaves the study's grid out.
    """

    set: Mapping[str, Any] = field(factory=dict)
    seeds: tuple[int, ...] | None = field(default=None, validator=optional(_SEEDS))
    compared: bool = True
    grid: bool = True


@frozen(kw_only=True)
class ComparisonConfig:
    """A comparison that was chosen before the results were seen.

    Args:
        arm: the arm.
        to: the arm that it is compared to. Default: ``study.baseline``.
        metric: what is compared. Default: the first of ``study.metrics``.
    """

    arm: str
    to: str | None = None
    metric: str | None = None


@frozen(kw_only=True)
class StudyConfig:
    """A whole study file.

    Args:
        study: name, seeds, recipe.
        arms: by name.
        set: laid over the recipe for every arm.
        grid: lists of values by dotted key, as ``"optimizer.lr" = [1e-4, 1e-3]``: every arm is run with every combination.
        comparisons: at most four, corrected by Holm; all others are exploratory.
    """

    study: StudySection
    arms: Mapping[str, ArmConfig] = field(validator=min_len(1))
    set: Mapping[str, Any] = field(factory=dict)
    grid: Mapping[str, Any] = field(factory=dict)
    comparisons: tuple[ComparisonConfig, ...] = field(default=(), validator=max_len(MOST_COMPARISONS))


@frozen(kw_only=True)
class StudyFile:
    """A study as it was read.

    Args:
        config: free of mistakes of its own; the arms' configs are checked by the plan.
        document: says where each value came from.
        file: the TOML file; None for a mapping.
    """

    config: StudyConfig
    document: Document
    file: FileSource | None

    def table(self, data: Mapping[str, Any], *path: str) -> TableSource:
        """Wrap a table of the file as a source of a config.

        Or what stands in its place.
        """
        return TableSource(data, self.file, path)

    def points(self) -> Mapping[str, list[Any]]:
        """List the values of each key of the grid."""
        return dict(_leaves(self.config.grid, ()))


def load_study(study: str | os.PathLike[str] | Mapping[str, Any]) -> StudyFile:
    """Read a study.

    Args:
        study: a TOML file, or a mapping of the same shape.

    Raises:
        ConfigError: every problem at once, with file, line and key.
    """
    file = None if isinstance(study, Mapping) else FileSource(study)
    data = file.data if file is not None else study
    assert isinstance(data, Mapping), "a parsed TOML document is a table"
    if file is not None and "study" not in data and "trainer" in data:
        raise ConfigError(f"{file.name}: is a recipe; a study names it as study.recipe, and wmtp run trains it alone")
    source = file if file is not None else MappingSource()
    section = Document()
    section.merge({"study": data.get("study", {})}, source)
    unset = section.expand(os.environ)  # in the arms it is done with the recipe's
    document = Document()
    document.merge({**data, **section.data} if "study" in data else data, source)
    if file is not None:
        document.origins[()] = file
    try:
        config = make_converter(load_plugins()).structure(document.data, StudyConfig)
    except Problems as found:
        raise located(document, [*unset, *map(_of_a_run, found.problems)]) from None
    if problems := [*unset, *_problems(config)]:
        raise located(document, problems)
    return StudyFile(config=config, document=document, file=file)


def _of_a_run(problem: Problem) -> Problem:
    """Say where a run's key belongs that stands in an arm itself."""
    match problem.path:
        case ("arms", str(arm), str(key)) if problem.message.startswith("unknown key") and key in fields_dict(Config):
            return evolve(problem, message=f"a key of the arm's runs; write it in [arms.{arm}.set]")
    return problem


def _leaves(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def _problems(config: StudyConfig) -> Iterator[Problem]:
    arms = list(config.arms)
    if not _NAME.fullmatch(config.study.name):
        yield Problem(("study", "name"), f"{config.study.name!r} cannot name a folder; use letters, digits, '.', '_' and '-'")
    if config.study.baseline not in config.arms:
        yield _unknown(("study", "baseline"), config.study.baseline, arms)
    elif not config.arms[config.study.baseline].compared:
        yield Problem(("study", "baseline"), f"the arm {config.study.baseline!r} has compared = false, so it is in no table")
    met: dict[str, str] = {}
    for name in arms:
        if not _NAME.fullmatch(name):
            yield Problem(("arms", name), f"{name!r} cannot name a folder; use letters, digits, '.', '_', '+' and '-'")
        if (other := met.setdefault(name.lower(), name)) != name:
            yield Problem(("arms", name), f"two arms of one name, {other!r} and {name!r}: rename one of them")
    for path, table in [(("set",), config.set), *((("arms", name, "set"), arm.set) for name, arm in config.arms.items())]:
        yield from _own_keys(path, table)
    for name, arm in config.arms.items():
        for own, key in overlaps(arm.set, config.grid) if arm.grid else ():
            message = f"the grid gives {key} to each run of this arm; leave one of them out, or write grid = false for the arm"
            yield Problem(("arms", name, "set", *own.split(".")), message)
    for key, values in _leaves(config.grid, ()):
        if not isinstance(values, list) or not values or len({repr(value) for value in values}) < len(values):
            yield Problem(("grid", key), "must be a list of values, each once")
        if key in OWN_KEYS:
            yield Problem(("grid", key), f"the study gives this to each run; {OWN_KEYS[key]}")
    named: dict[object, int] = {}
    for index, comparison in enumerate(config.comparisons):
        yield from _comparison(("comparisons", index), comparison, config)
        metric = comparison.metric or next(iter(config.study.metrics), None)
        what = frozenset([comparison.arm, comparison.to or config.study.baseline]), metric
        if named.setdefault(what, index) != index:  # Holm would count it twice
            yield Problem(("comparisons", index), f"compares the same as comparisons.{named[what]}; remove one of them")


def overlaps(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find keys of two tables that are, or hold, one another.

    Keys are dotted.
    """
    for own, _ in _leaves(first, ()):
        for other, _ in _leaves(second, ()):
            if f"{own}.".startswith(f"{other}.") or f"{other}.".startswith(f"{own}."):
                yield own, other


#: keys of a run that are the study's
OWN_KEYS: Final = {
    "run.seed": "write study.seeds",
    "run.name": "runs are named after their arm and seed",
    "run.output_dir": "write study.output_dir",
}


def _own_keys(path: KeyPath, table: Mapping[str, Any]) -> Iterator[Problem]:
    run = table.get("run")
    for key, hint in OWN_KEYS.items():
        if isinstance(run, Mapping) and (name := key.partition(".")[2]) in run:
            yield Problem((*path, "run", name), f"the study gives this to each run; {hint}")


def _comparison(path: KeyPath, comparison: ComparisonConfig, config: StudyConfig) -> Iterator[Problem]:
    to = comparison.to if comparison.to is not None else config.study.baseline
    for key, name in (("arm", comparison.arm), ("to", to)):
        if name not in config.arms:
            yield _unknown((*path, key), name, list(config.arms))
        elif not config.arms[name].compared:
            yield Problem((*path, key), f"the arm {name!r} has compared = false, so it is in no table")
    if comparison.arm == to:
        yield Problem(path, f"compares the arm {to!r} with itself")
    if comparison.metric is None and not config.study.metrics:
        yield Problem((*path, "metric"), "required where study.metrics names none: a comparison is chosen before its result")


def _unknown(path: KeyPath, name: str, arms: list[str]) -> Problem:
    hint = did_you_mean(name, arms) or f"one of: {', '.join(arms)}"
    return Problem(path, f"there is no arm {name!r}; {hint}")

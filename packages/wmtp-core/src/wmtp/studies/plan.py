"""Runs of a study, what each needs, and its key."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import evolve, frozen

from wmtp.config.inputs import hub_names_read, inputs, with_uris
from wmtp.config.load import ConfigSource, Loaded, load, located
from wmtp.config.overrides import Override, parse_override
from wmtp.config.problems import KeyPath, Problem
from wmtp.config.rules import check_loaded
from wmtp.config.schema import Config
from wmtp.config.sources import Document
from wmtp.config.tree import flat, to_mapping
from wmtp.errors import ConfigError
from wmtp.plugins.loader import load_plugins
from wmtp.runs.directory import is_free_to_change
from wmtp.spelling import did_you_mean
from wmtp.storage.uris import file_path, local_path
from wmtp.studies.config import MOST_COMPARISONS, OWN_KEYS, StudyFile, overlaps
from wmtp.studies.metrics import metric_problems, odd_metrics

__all__ = ["Arm", "PlannedRun", "StudyPlan", "counted", "make_plan"]

_MODEL_OF: Final = re.compile(r"\$\{arm:(?P<arm>[^{}]*)\}")
#: stands for the model of an arm, whose seed is not known yet
_STAND_IN: Final = "arm://"


@frozen(kw_only=True)
class Arm:
    """One arm, with one combination of the grid.

    Args:
        name: of the arm, and the grid's values.
        base: its name in the study file.
        point: the grid's values by key.
        compared: whether it is in tables.
        seeds: of its runs.
    """

    name: str
    base: str
    point: Mapping[str, Any]
    compared: bool
    seeds: tuple[int, ...]


@frozen(kw_only=True)
class PlannedRun:
    """One run of a study.

    Args:
        name: of its directory.
        arm: name of its arm.
        seed: its ``run.seed``.
        key: a digest of what decides its result; a finished run counts where its key is the same.
        config: complete, with the name and folder of the run.
        needs: names of the runs whose models it begins with or is measured against.
    """

    name: str
    arm: str
    seed: int
    key: str
    config: Config
    needs: tuple[str, ...]


@frozen(kw_only=True)
class StudyPlan:
    """Everything that a study would do.

    Args:
        file: the study as it was read.
        folder: of the study.
        arms: in the order of the file.
        runs: in the order in which they are begun: by seed, then by arm, each after those it needs.
        comparisons: those that were named, by full names of arms.
        warnings: what is allowed and yet may not be meant.
    """

    file: StudyFile
    folder: Path
    arms: Sequence[Arm]
    runs: Sequence[PlannedRun]
    comparisons: Sequence[tuple[Arm, Arm, str]]
    warnings: Sequence[str]

    @property
    def baseline(self) -> str:
        """Arm that others are compared to, without values of the grid."""
        return self.file.config.study.baseline

    def baseline_of(self, arm: Arm) -> Arm | None:
        """Find the baseline at an arm's point of the grid, if any."""
        return _at_point(self.arms, self.baseline, arm.point)

    def chosen(self, arms: Iterable[str] | None, seeds: Iterable[int] | None) -> list[PlannedRun]:
        """Choose the runs of some arms and seeds, and their needs.

        Raises:
            ConfigError: there is no such arm or seed.
        """
        names, numbers = _listed(arms), None if seeds is None else set(seeds)
        bases = list(dict.fromkeys(arm.base for arm in self.arms))
        known = {arm.name: arm.base for arm in self.arms}
        problems = [
            f"--arms: there is no arm {name!r}; {did_you_mean(name, bases) or 'one of: ' + ', '.join(bases)}"
            for name in names or ()
            if name not in bases and name not in known
        ]
        problems += [f"--arms: is empty; name some of: {', '.join(bases)}"] if names is not None and not names else []
        problems += ["--seeds: is empty; name some, or leave it out"] if numbers is not None and not numbers else []
        there = {run.seed for run in self.runs}
        problems += [f"--seeds: no arm has the seed {seed}" for seed in sorted((numbers or set()) - there)]
        if problems:
            raise ConfigError(problems)
        wanted = {
            run.name
            for run in self.runs
            if (names is None or run.arm in names or known[run.arm] in names) and (numbers is None or run.seed in numbers)
        }
        for run in reversed(self.runs):  # what a run needs comes before it
            if run.name in wanted:
                wanted |= set(run.needs)
        return [run for run in self.runs if run.name in wanted]


def _listed(names: Iterable[str] | None) -> set[str] | None:
    return None if names is None else set(names)


def make_plan(study: StudyFile, recipe: Sequence[ConfigSource], overrides: Iterable[str] = ()) -> StudyPlan:
    """Lay out every run of a study.

    Args:
        study: as it was read.
        recipe: what every arm begins with; empty: what ``study.recipe`` names.
        overrides: ``KEY=VALUE`` texts, as for ``--set``, laid over every run.

    Raises:
        ConfigError: an arm is wrong; every problem of every arm at once.
    """
    config = study.config
    folder = (file_path(config.study.output_dir) / config.study.name).resolve()
    sources = list(recipe) or _recipe(study)
    overrides = list(overrides)
    arms = _arms(study)
    made: dict[str, tuple[Config, tuple[str, ...]]] = {}
    problems: list[str] = []
    warnings = dict.fromkeys(_laid_over(study, overrides))
    for arm in arms:
        try:
            loaded, needs = _load_arm(study, arm, arms, sources, overrides)
            made[arm.name] = loaded.config, needs
            warnings |= dict.fromkeys(loaded.document.drops())
        except ConfigError as error:
            problems += error.problems
    problems = list(dict.fromkeys(problems))  # a problem of the recipe repeats for every arm
    if not problems:
        problems += _cycles({name: needs for name, (_, needs) in made.items()})
    if not problems:
        compared = [made[arm.name][0] for arm in arms if arm.compared]
        if unmeasured := list(metric_problems(config, compared)):
            raise located(study.document, unmeasured)
        types = {provided.type for provided in load_plugins().of_kind("evaluators")}
        warnings |= dict.fromkeys(odd_metrics(config, compared, types))
    if problems and not sources:
        problems.append("study.recipe: names no recipe, so [set] is the whole one")
    if problems:
        raise ConfigError(problems)
    runs = _runs(study, arms, made, folder)
    warnings |= dict.fromkeys(_alike(arms, runs))
    return StudyPlan(
        file=study,
        folder=folder,
        arms=arms,
        runs=runs,
        comparisons=_comparisons(study, arms),
        warnings=list(warnings),
    )


def _laid_over(study: StudyFile, overrides: Iterable[str]) -> Iterator[str]:
    """Say which values of arms ``--set`` takes the place of.

    Raises:
        ConfigError: of values of the grid, after which arms are called, or of what the study gives to each run.
    """
    for text in overrides:
        key = ".".join(map(str, parse_override(text).path))
        if key in OWN_KEYS:
            raise ConfigError(f"--set {key}: the study gives this to each run; {OWN_KEYS[key]}")
        if (found := next(overlaps({key: 0}, study.config.grid), None)) is not None:
            raise ConfigError(
                f"--set {key}: the grid of this study gives {found[1]} to each run; change [grid], or leave it out"
            )
        names = [name for name, arm in study.config.arms.items() if any(overlaps(arm.set, {key: 0}))]
        if names:
            yield f"--set {key}: takes the place of what the arm{'s'[: len(names) > 1]} {', '.join(names)} set"


def _recipe(study: StudyFile) -> list[ConfigSource]:
    named = study.config.study.recipe
    beside = local_path(study.file.name).parent if study.file is not None else Path()
    return [beside / local_path(name, key="study.recipe") for name in ([named] if isinstance(named, str) else named or ())]


def _arms(study: StudyFile) -> list[Arm]:
    points = study.points()
    combinations = [dict(zip(points, values, strict=True)) for values in itertools.product(*points.values())]
    found = []
    for name, arm in study.config.arms.items():
        for point in combinations if arm.grid else [{}]:
            found.append(
                Arm(
                    name=" ".join([name, *(f"{key}={value}" for key, value in point.items())]),
                    base=name,
                    point=point,
                    compared=arm.compared,
                    seeds=arm.seeds or study.config.study.seeds,
                )
            )
    return found


def _at_point(arms: Iterable[Arm], base: str, point: Mapping[str, Any]) -> Arm | None:
    """Find an arm with these values of the grid, or without any."""
    return next((arm for arm in arms if arm.base == base and arm.point in (dict(point), {})), None)


def _load_arm(
    study: StudyFile, arm: Arm, arms: Sequence[Arm], recipe: Sequence[ConfigSource], overrides: Sequence[str]
) -> tuple[Loaded, tuple[str, ...]]:
    """Read and check an arm's config, and find arms it needs.

    Their models are stand-ins.
    """
    needs: dict[str, None] = {}
    problems: list[Problem] = []

    def replaced(value: Any, path: KeyPath) -> Any:
        if isinstance(value, Mapping):
            return {key: replaced(element, (*path, key)) for key, element in value.items()}
        if isinstance(value, list | tuple):
            return [replaced(element, (*path, index)) for index, element in enumerate(value)]
        if not isinstance(value, str) or (match := _MODEL_OF.search(value)) is None:
            return value
        needed = _at_point(arms, match["arm"], arm.point)
        names = [other for other in study.config.arms if other != arm.base]
        if match[0] != value:
            problems.append(Problem(path, f"{match[0]} is a whole model: write nothing before or after it"))
        elif needed is None or needed.base == arm.base:
            advice = did_you_mean(match["arm"], names) or f"one of: {', '.join(names)}"
            what = "is the arm itself" if needed is not None else "is no arm of this study"
            problems.append(Problem(path, f"{match['arm']!r} {what}; {advice}"))
        elif lacking := [seed for seed in arm.seeds if seed not in needed.seeds and len(needed.seeds) > 1]:
            problems.append(Problem(path, f"the arm {needed.name!r} has no run with seed {lacking[0]}; give it the same seeds"))
        else:
            needs[needed.name] = None
            return f"{_STAND_IN}{needed.name}"
        return value

    base = study.table(replaced(study.config.set, ("set",)), "set")
    own = study.table(replaced(study.config.arms[arm.base].set, ("arms", arm.base, "set")), "arms", arm.base, "set")
    if problems:
        raise located(study.document, problems)
    point = [Override(path=parse_override(f"{key}=0").path, value=value) for key, value in arm.point.items()]
    laid = Document()
    for override in point:
        laid.override(override)
    grid = study.table(laid.data, "grid")
    named = {"run": {"name": None}}
    loaded = load([*recipe, base, own, grid, named], overrides)
    loaded, _ = hub_names_read(loaded)
    check_loaded(loaded, not_yet_made=[f"{_STAND_IN}{name}" for name in needs])
    if loaded.config.launcher.remote:
        raise ConfigError(f"launcher.type: '{loaded.config.launcher.type}' is elsewhere; a study trains on this machine")
    for key, value in (("checkpoints.uri", loaded.config.checkpoints.uri), ("run.push_to", loaded.config.run.push_to)):
        if value is not None:
            message = "one place for the models of all runs; leave it out: each has a folder of its own"
            raise located(loaded.document, [Problem(tuple(key.split(".")), message)])
    return loaded, tuple(needs)


def _cycles(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Find arms that need each other."""
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> list[str]:
        if name in above:
            return [f"arms: {' needs '.join((*above[above.index(name) :], name))}: none of them can be the first"]
        if name in done:
            return []
        found = [line for needed in needs[name] for line in visit(needed, (*above, name))]
        done.add(name)
        return found

    return [line for name in needs for line in visit(name, ())][:1]


def _runs(
    study: StudyFile, arms: Sequence[Arm], made: Mapping[str, tuple[Config, tuple[str, ...]]], folder: Path
) -> list[PlannedRun]:
    by_name = {arm.name: arm for arm in arms}
    found: dict[tuple[str, int], PlannedRun] = {}

    def plan(arm: Arm, seed: int) -> PlannedRun:
        if (arm.name, seed) not in found:
            config, needs = made[arm.name]
            before = [plan(by_name[name], seed if seed in by_name[name].seeds else by_name[name].seeds[0]) for name in needs]
            found[arm.name, seed] = _planned(study, arm, seed, config, before, folder)
        return found[arm.name, seed]

    for seed in dict.fromkeys(seed for arm in arms for seed in arm.seeds):
        for arm in arms:
            if seed in arm.seeds:
                plan(arm, seed)
    return list(found.values())


def _planned(study: StudyFile, arm: Arm, seed: int, config: Config, before: Sequence[PlannedRun], folder: Path) -> PlannedRun:
    stand_ins = {f"{_STAND_IN}{run.arm}": run for run in before}
    keys = {given.key: stand_ins[given.uri] for given in inputs(config) if given.uri in stand_ins}
    config = evolve(config, run=evolve(config.run, seed=seed, output_dir=str(folder / "runs")))
    if config.data.cache_dir is None:
        config = evolve(config, data=evolve(config.data, cache_dir=str(folder / "tokens")))
    if not study.config.study.keep_models:  # it would be removed at once
        config = evolve(config, checkpoints=evolve(config.checkpoints, save_final=False))
    key = _key(with_uris(config, {place: f"{_STAND_IN}{run.key}" for place, run in keys.items()}))
    config = with_uris(config, {place: str(folder / "runs" / run.name / "model") for place, run in keys.items()})
    name = f"{re.sub(r'[^A-Za-z0-9._+=-]', '+', arm.name)}-seed{seed}-{key[:8]}"
    return PlannedRun(
        name=name,
        arm=arm.name,
        seed=seed,
        key=key,
        config=evolve(config, run=evolve(config.run, name=name)),
        needs=tuple(dict.fromkeys(run.name for run in before)),
    )


def _alike(arms: Sequence[Arm], runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Name arms in tables whose runs compute the same."""
    compared = {arm.name for arm in arms if arm.compared}
    first: dict[str, str] = {}
    for run in runs:
        if run.arm in compared and (other := first.setdefault(run.key, run.arm)) != run.arm:
            yield f"the arms {other} and {run.arm} have equal settings: both compute the same, and their difference is none"


def counted(config: Config) -> dict[str, Any]:
    """Flatten what decides the result of a run."""
    values = flat(to_mapping(config)).items()
    return {key: one for key, one in values if key != "run.name" and (key.startswith("eval") or not is_free_to_change(key))}


def _key(config: Config) -> str:
    """Digest what decides the result of a run."""
    return hashlib.sha256(json.dumps(counted(config), sort_keys=True, default=str).encode()).hexdigest()


def _comparisons(study: StudyFile, arms: Sequence[Arm]) -> list[tuple[Arm, Arm, str]]:
    """Name the comparisons by full names of arms.

    With a grid there is one at each of its points.

    Raises:
        ConfigError: they are too many.
    """
    found = []
    metrics = study.config.study.metrics
    for comparison in study.config.comparisons:
        for arm in arms:
            if arm.base == comparison.arm:
                other = _at_point(arms, comparison.to or study.config.study.baseline, arm.point)
                if other is not None:
                    found.append((arm, other, comparison.metric or metrics[0]))
    if len(found) > MOST_COMPARISONS:
        message = f"with the grid these are {len(found)} comparisons; name at most {MOST_COMPARISONS}, the rest are exploratory"
        raise located(study.document, [Problem(("comparisons",), message)])
    return found

"""Measures a model that is there already."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from wmtp.config.component_rules import component_problems
from wmtp.config.load import ConfigSource, Loaded, as_list, load, load_storage, located
from wmtp.config.places import Place, build_backends
from wmtp.config.problems import Problem
from wmtp.config.schema import Config
from wmtp.config.tree import flatten
from wmtp.devices import apart_from_the_caller, autocast_context, pick_device, pick_precision
from wmtp.errors import ConfigError
from wmtp.evaluation.base import Measured
from wmtp.evaluation.consent import require_consent
from wmtp.evaluation.measure import measure, prepare
from wmtp.evaluation.unread import unread_problems
from wmtp.models.acceleration import accelerate
from wmtp.models.opening import OpenedModel, find_model, open_model, saved_precision
from wmtp.plugins import load_plugins
from wmtp.plugins.built import built
from wmtp.plugins.contract import TrainerConfig
from wmtp.runs.directory import CONFIG_FILE
from wmtp.runs.step_file import last_steps
from wmtp.storage.uris import local_path, scheme_of
from wmtp.tracking import RunInfo

__all__ = ["Evaluated", "evaluate_model"]

logger = logging.getLogger("wmtp")


@frozen(kw_only=True)
class Evaluated:
    """Result of `evaluate_model`.

    Args:
        model: the model's path.
        folder: where the result files are.
        numbers: the numbers by name.
    """

    model: Path
    folder: Path
    numbers: Mapping[str, float]


@frozen(kw_only=True)
class _NoTrainer(TrainerConfig):
    """Placeholder in a config that trains nothing."""

    type = "none"

    def build(self) -> Any:
        """Never called."""
        raise AssertionError("wmtp eval trains nothing")


@apart_from_the_caller()
def evaluate_model(
    name: str,
    files: ConfigSource | Sequence[ConfigSource] = (),
    *,
    overrides: Iterable[str] = (),
    output: str | None = None,
    allow_code_execution: bool = False,
) -> Evaluated:
    """Do what ``wmtp eval`` does.

    Args:
        name: a run directory, or a model as `wmtp.models.opening.open_model` takes it.
        files: TOML files laid over the run's config; for a model that stands alone, what to measure and on which data.
        overrides: ``KEY=VALUE`` texts laid over those.
        output: the folder for results. Default: the run directory, or ``evaluations/NAME``.
        allow_code_execution: whether evaluators may run code that the model wrote.

    Raises:
        ConfigError: there is no such model, nothing to measure, or the config is wrong.
        WMTPError: something cannot be read, measured or written.
    """
    files = as_list(files)
    target = None if output is None else local_path(output, key="--output").absolute()
    if target is not None and target.exists() and not target.is_dir():
        raise ConfigError(f"--output {target}: is a file; name a folder")
    is_remote = scheme_of(name) != "file"
    path, run_dir = find_model(name, load_storage(files, overrides) if is_remote else None)
    loaded = _config(path, run_dir, files, overrides)
    config = loaded.config
    problems = [problem for problem in component_problems(config, loaded.registry) if problem.path[0] == "eval"]
    problems += unread_problems(loaded, path, run_dir)
    if not config.eval:
        raise ConfigError(
            "nothing to measure: name a TOML file with [[eval]] tables, or write --set 'eval=[{type=\"perplexity\"}]'; "
            f"installed: {', '.join(sorted(p.type for p in loaded.registry.of_kind('evaluators')))}"
        )
    if config.data.eval is None:
        problems += [
            Problem(("eval", number), f"'{evaluator.type}' is measured on [data.eval], which is missing; add it")
            for number, evaluator in enumerate(config.eval)
            if evaluator.needs_eval_data
        ]
    if problems:
        raise located(loaded.document, problems)
    require_consent(config.eval, allow_code_execution)

    if config.devices.threads is not None:
        torch.set_num_threads(config.devices.threads)
    device = pick_device(config.devices.device)
    precision = pick_precision(config.devices.precision, device)
    if config.devices.precision == "fp8":
        logger.info('devices.precision: an evaluation computes in bf16, as with "bf16-params"; fp8 is for training')
    parameters = "bf16" if precision == "bf16-params" else "fp32"
    prepare(config.eval, Place.of(config).fetch)
    opened = open_model(name, device=device, precision=parameters, config=config)
    accelerate(opened.model, config.devices, learns=False)
    folder = target or run_dir or Path("evaluations") / path.name
    measured = Measured(
        model=opened.model,
        tokenizer=opened.tokenizer,
        batches=_batches(config, opened),
        device=device,
        autocast=autocast_context("bf16" if precision == "bf16" else "fp32", device),
        seed=config.run.seed,
        output_dir=folder / "evaluation",
        allow_code_execution=allow_code_execution,
        fetch=Place.of(config).fetch,
    )
    numbers = measure(config.eval, measured, folder)
    _track(config, folder, run_dir, numbers)
    return Evaluated(model=path, folder=folder, numbers=numbers)


def _config(path: Path, run_dir: Path | None, files: Sequence[ConfigSource], overrides: Iterable[str]) -> Loaded:
    if run_dir is not None:  # wherever that is now
        here = {"run": {"output_dir": str(run_dir.resolve().parent)}}
        return load([run_dir / CONFIG_FILE, here, *files], overrides)
    # what a whole config needs and a measurement does not; the files may say it nevertheless
    base = {
        "models": {"base": {"type": "hf", "uri": str(path)}},
        "trainer": {"type": _NoTrainer.type},
        "devices": {"precision": saved_precision(path)},
        "tracker": {"type": "jsonl"},
        "datasets": {"python": {"type": "python-source"}},
    }
    registry = load_plugins().with_classes([("trainers", _NoTrainer)])
    return load([base, *files], overrides, registry=registry)


def _batches(config: Config, opened: OpenedModel) -> Sequence[Any]:
    from wmtp.config.data_rules import eval_sources, train_sources
    from wmtp.data.batches import EvalBatches
    from wmtp.data.prepare import prepare_eval_data, use_chat_template
    from wmtp.models.vocabulary import check_ids

    if config.data.eval is None:
        return ()
    use_chat_template(opened.tokenizer, config.data.train)
    place = Place.of(config)
    names = train_sources(config) if config.data.eval.holdout is not None else eval_sources(config)
    paths = {name: place.path(config.datasets[name], f"datasets.{name}") for name in names if name in config.datasets}
    data = prepare_eval_data(config, opened.tokenizer, paths)
    check_ids({opened.name: opened.model.vocab_size}, opened.tokenizer, (data,))
    return EvalBatches(data, config.data)


def _track(config: Config, folder: Path, run_dir: Path | None, numbers: Mapping[str, float]) -> None:
    """Log the numbers with the tracker.

    In the run's own record, at its last step, or in one for this model.
    """
    place = run_dir or folder
    logged = last_steps(place / "metrics.jsonl")
    step = max(logged.values(), default=None)
    tracker = built(config.tracker, "trackers")
    tracker.start(
        RunInfo(
            name=place.name,
            run_dir=place,
            tags={"wmtp.evaluation": "true"},
            params=flatten(config),
            resumed_step=step,
            logged=logged,
            backends=build_backends(config.storage),
        )
    )
    try:
        tracker.log(step or 0, numbers)
    finally:
        tracker.finish("finished", None)

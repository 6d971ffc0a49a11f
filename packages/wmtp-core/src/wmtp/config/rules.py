"""Rules across the sections of a config.

Torch-free: they run before a GPU is paid for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from wmtp.config.adapter_rules import adapter_problems
from wmtp.config.component_rules import component_problems
from wmtp.config.data_rules import check_answers, check_first_examples, check_sources
from wmtp.config.eval_metrics import eval_metric_problem
from wmtp.config.fp8_rules import fp8_problems
from wmtp.config.graph_rules import graph_problems
from wmtp.config.idle import idle_problems
from wmtp.config.inputs import inputs
from wmtp.config.load import Loaded, located
from wmtp.config.problems import KeyPath, Problem, dotted
from wmtp.config.required_models import required_models
from wmtp.config.schema import Config
from wmtp.config.secrets import secret_problems
from wmtp.config.tree import to_mapping
from wmtp.errors import ConfigError, described
from wmtp.plugins.failures import plugin_failure
from wmtp.plugins.loader import load_plugins
from wmtp.plugins.registry import Registry
from wmtp.spelling import did_you_mean, is_text
from wmtp.storage.uris import file_path, scheme_of
from wmtp.tokenizers.chat_template import template_source

__all__ = ["check", "check_loaded"]

_MODELS: Final = ("base", "ref", "rm", "critic")
_RUN_NAME: Final = re.compile(r"[\w][\w.+=@ -]*(?<! )")


def check(config: Config, registry: Registry | None = None) -> None:
    """Check what one class alone cannot.

    That is names that refer to other sections, files that must exist, numbers that must agree.

    Args:
        config: a config.
        registry: the plugins; default: all that are installed.

    Raises:
        ConfigError: every problem at once.
    """
    problems = list(_problems(config, registry if registry is not None else load_plugins()))
    if problems:
        raise ConfigError([f"{dotted(p.path)}: {p.message}" for p in problems])


def check_loaded(loaded: Loaded, *, not_yet_made: Collection[str] = ()) -> None:
    """As `check`, with the file and line of each problem.

    Args:
        loaded: a config and its sources.
        not_yet_made: URIs of inputs that another run will have made when this one starts: they are not looked at.
    """
    later = [given.path[:-1] for given in inputs(loaded.config) if given.uri in not_yet_made]
    problems = [
        problem
        for problem in _problems(loaded.config, loaded.registry)
        if not any(problem.path[: len(path)] == path for path in later)
    ]
    if problems:
        raise located(loaded.document, problems)


def _problems(config: Config, registry: Registry) -> Iterator[Problem]:
    for rule in (
        *(_run, _models, _heads, _data, _length, _best, _devices),
        *(adapter_problems, fp8_problems, graph_problems, idle_problems),
    ):
        yield from rule(config)
    yield from secret_problems(to_mapping(config), ())
    yield from component_problems(config, registry)
    yield from check_answers(config, registry)
    if config.launcher.remote:
        yield from _remote(config, registry)


def _remote(config: Config, registry: Registry) -> Iterator[Problem]:
    """Run the remote launcher's check of the whole config."""
    plugin = registry.provider(type(config.launcher)) or type(config.launcher).__qualname__
    try:
        launcher: Any = config.launcher.build()  # a RemoteLauncher, as its suite tests
        lines = list(launcher.check(config))
    except Exception as error:
        what = f"check() of the launcher '{config.launcher.type}' of {plugin} failed: {described(error)}"
        yield Problem(("launcher",), str(plugin_failure(error) or what))
        return
    for line in lines:
        yield Problem.of_line(str(line))


def _run(config: Config) -> Iterator[Problem]:
    name = config.run.name
    if name is not None and not (_RUN_NAME.fullmatch(name) and len(name.encode()) <= 200):
        yield Problem(
            ("run", "name"),
            f"{name!r} cannot name a folder; use letters, digits, '.', '_' and '-', and begin with no '.' or '-'",
        )
    yield from _local_folder(config.run.output_dir, ("run", "output_dir"))
    if config.data.cache_dir is not None:
        yield from _local_folder(config.data.cache_dir, ("data", "cache_dir"))
    if (uri := config.checkpoints.uri) is not None and "://" not in uri and not config.launcher.remote:
        yield from _local_folder(uri, ("checkpoints", "uri"))
    yield from _local_folder(config.storage.cache_dir, ("storage", "cache_dir"))
    yield from _push_target(config)


def _push_target(config: Config) -> Iterator[Problem]:
    """Refuse to push over a local folder that holds what is needed."""
    uri, path = config.run.push_to, ("run", "push_to")
    if uri is None or config.launcher.remote:
        return
    needed = {"run.output_dir": config.run.output_dir, **{given.key: given.uri for given in inputs(config)}}
    folders = {"checkpoints.uri": config.checkpoints.uri, "data.cache_dir": config.data.cache_dir}
    needed |= {key: folder for key, folder in folders.items() if folder is not None}
    needed |= {"storage.cache_dir": config.storage.cache_dir, "the current folder": ".", "the home folder": "~"}
    try:
        if scheme_of(uri) != "file":
            return
        target = file_path(uri).resolve()
        held = [key for key, text in needed.items() if scheme_of(text) == "file" and _is_inside(file_path(text), target)]
    except ConfigError:  # said of that key
        return
    if held:
        yield Problem(path, f"{uri!r} is replaced whole, and holds {', '.join(held)}; write a new folder's name")
    else:
        yield from _local_folder(uri, path)


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder)


def _local_folder(uri: str, path: KeyPath) -> Iterator[Problem]:
    try:
        if scheme_of(uri) != "file":
            yield Problem(path, f"{uri!r} is not on this machine; write the path of a local folder")
        elif (there := _what_is_there(file_path(uri))) is not None:
            yield Problem(path, f"{uri!r} {there}; write the path of a folder")
        elif not is_text(whole := str(file_path(uri))):  # the run's config.toml holds it
            yield Problem(path, f"{whole!r} is not UTF-8 text, which a config is; rename the folder, or write another one")
    except ConfigError as error:
        yield from (Problem(path, problem) for problem in error.problems)


def _what_is_there(folder: Path) -> str | None:
    """Say what stands in the way of a folder; None for nothing."""
    found = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if found.is_dir():
        return None
    where = "is" if found == folder else f"is inside of {found}, which is"
    return f"{where} a file" if found.exists() else f"{where} a link to {os.readlink(found)}, which is not there"


def _models(config: Config) -> Iterator[Problem]:
    required = required_models(config)
    if "base" not in config.models:
        yield Problem(("models", "base"), "required, and missing: the model that is trained", at=("models",))
    for name, need in required.items():
        if name not in config.models:
            yield Problem(("models", name), f"required by the trainer '{need.trainer}', and missing", at=("trainer",))
    allowed = list(dict.fromkeys((*_MODELS, *required)))
    for name, model in config.models.items():
        if name not in allowed:
            hint = did_you_mean(name, allowed) or f"models: {', '.join(allowed)}"
            yield Problem(("models", name), f"unknown model; {hint}")
        if name != "base" and model.heads is not None:
            yield Problem(("models", name, "heads"), "only models.base has heads; remove this table")


def _heads(config: Config) -> Iterator[Problem]:
    base = config.models.get("base")
    heads = base.heads if base is not None else None
    if heads is None:
        return
    path = ("models", "base", "heads")
    weights = heads.head_weights
    if weights is not None:
        if heads.decay is not None:
            yield Problem((*path, "decay"), "conflicts with head_weights; remove one of them")
        if len(weights) != heads.horizon:
            yield Problem(
                (*path, "head_weights"), f"has {len(weights)} weights, but horizon = {heads.horizon}; write one a head"
            )
        if not any(weights):
            yield Problem((*path, "head_weights"), "are all 0, so nothing would be learned")
    if heads.horizon >= config.data.train.max_length:
        yield Problem(
            (*path, "horizon"), f"{heads.horizon} must be less than data.train.max_length = {config.data.train.max_length}"
        )
    steps = config.train.max_steps
    if steps is not None and heads.warmup_steps > steps:
        yield Problem((*path, "warmup_steps"), f"{heads.warmup_steps} must be at most train.max_steps = {steps}")
    if heads.warmup_steps and heads.horizon == 1:
        yield Problem((*path, "warmup_steps"), "with horizon = 1 there is no head beside the model's own to warm up; remove it")


def _data(config: Config) -> Iterator[Problem]:
    yield from check_sources(config)
    train = config.data.train
    if train.micro_batch_size is not None and train.micro_batch_size > train.batch_size:
        yield Problem(
            ("data", "train", "micro_batch_size"),
            f"{train.micro_batch_size} must be at most data.train.batch_size = {train.batch_size}",
        )
    for name in config.datasets:
        if not name.strip() or not name.isprintable():
            yield Problem(("datasets", name), "the table needs a name that can be printed; write one, as [datasets.mine]")
    yield from _learned(config)
    yield from check_first_examples(config)
    if config.data.eval is None:
        for index, evaluator in enumerate(config.eval):
            if evaluator.needs_eval_data:
                yield Problem(("eval", index), f"'{evaluator.type}' is measured on [data.eval], which is missing; add it")


def _learned(config: Config) -> Iterator[Problem]:
    train = config.data.train
    if train.learn_prompt is not None and train.learn is not None and train.learn_prompt != (train.learn == "all"):
        said = str(train.learn_prompt).lower()
        yield Problem(("data", "train", "learn_prompt"), f'is {said} beside learn = "{train.learn}"; remove learn_prompt')
    for key, weights in (("prompt_weights", train.prompt_weights), ("response_weights", train.response_weights)):
        for name in weights:
            if name not in config.datasets:
                hint = did_you_mean(name, config.datasets) or f"there are: {', '.join(config.datasets)}"
                yield Problem(("data", "train", key, name), f"there is no [datasets.{name}]; {hint}")
    if train.chat_template is not None and not config.launcher.remote:
        try:
            template_source(train.chat_template)
        except ConfigError as error:
            yield from (Problem(("data", "train", "chat_template"), problem) for problem in error.problems)


def _length(config: Config) -> Iterator[Problem]:
    schedule, train = config.schedule, config.train
    if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
        yield Problem(("schedule", "warmup_ratio"), "conflicts with warmup_steps; remove one of them")
    if train.max_steps is not None and schedule.warmup_steps is not None and schedule.warmup_steps > train.max_steps:
        yield Problem(
            ("schedule", "warmup_steps"), f"{schedule.warmup_steps} must be at most train.max_steps = {train.max_steps}"
        )
    stopping = train.early_stopping
    if stopping is not None and stopping.metric.startswith("eval/"):
        path = ("train", "early_stopping", "metric")
        if (problem := eval_metric_problem(stopping.metric, config)) is not None:
            yield Problem(path, problem, at=path[:2] if config.data.eval is None else None)
        if train.eval_interval is None:
            yield Problem(path, f"'{stopping.metric}' needs train.eval_interval: else it is measured only once", at=path[:2])
    elif train.eval_interval is not None and config.data.eval is None:
        yield Problem(("train", "eval_interval"), "there is nothing to measure on: [data.eval] is missing")


def _best(config: Config) -> Iterator[Problem]:
    best, path = config.checkpoints.best, ("checkpoints", "best")
    if best is None:
        if config.checkpoints.best_mode != "min":
            yield Problem(("checkpoints", "best_mode"), "has no effect without checkpoints.best; write that too, or remove it")
        return
    if not best.startswith("eval/"):
        yield Problem(path, f"{best!r} is no metric of [data.eval]; write one that is, as 'eval/loss' or 'eval/loss/head_1'")
    elif (problem := eval_metric_problem(best, config)) is not None:
        yield Problem(path, problem)
    elif config.train.eval_interval is None:
        yield Problem(path, f"{best!r} needs train.eval_interval: else it is measured only once")


def _devices(config: Config) -> Iterator[Problem]:
    processes = config.launcher.processes
    if config.devices.device == "mps" and isinstance(processes, int) and processes > 1:
        yield Problem(("launcher", "processes"), f'{processes}, but devices.device = "mps" computes in one process; write 1')
    several = isinstance(processes, int) and processes > 1
    divides = config.devices.fsdp.strategy != "none" if config.devices.fsdp is not None else several
    if divides and config.optimizer.takes_whole_only:
        yield Problem(
            ("optimizer", "type"),
            f"'{config.optimizer.type}' takes whole parameters, which FSDP divides; set devices.fsdp.strategy = \"none\"",
        )
    if config.devices.activation_checkpointing == "offload" and config.devices.device in ("cpu", "mps"):
        yield Problem(
            ("devices", "activation_checkpointing"),
            f"'offload' moves activations from a GPU to the host's memory, where \"{config.devices.device}\" has them already; "
            'write "full"',
        )
    if processes == 1 and config.devices.fsdp is not None and config.devices.fsdp.strategy == "hybrid":
        yield Problem(
            ("devices", "fsdp", "strategy"),
            "'hybrid' shards a model over the processes of a machine, and launcher.processes = 1; write more processes, or "
            '"full" (shards over machines) or "none" (replicates)',
        )
    if config.devices.device == "mps" and config.devices.fsdp is not None:
        yield Problem(("devices", "fsdp"), 'shards a model over GPUs or CPU processes, not with devices.device = "mps"')

"""Rules across the sections of a config.

Torch-free: they run before a GPU is paid for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from attrs import evolve, frozen

from wmtp.config.adapter_rules import adapter_problems
from wmtp.config.data_rules import check_answers, check_first_examples, check_sources
from wmtp.config.fp8_rules import fp8_problems
from wmtp.config.idle import idle_problems
from wmtp.config.inputs import inputs
from wmtp.config.load import Loaded, located
from wmtp.config.model_rules import model_problems
from wmtp.config.problems import KeyPath, Problem, dotted
from wmtp.config.schema import Config
from wmtp.config.tree import components, to_mapping
from wmtp.errors import ConfigError, described
from wmtp.plugins.failures import plugin_failure
from wmtp.plugins.loader import load_plugins
from wmtp.plugins.registry import Registry
from wmtp.redaction import holds_credentials
from wmtp.spelling import did_you_mean
from wmtp.storage.hub.names import both_readings, plain_name, unclear_target
from wmtp.storage.uris import backend_for, file_path, scheme_of, storage_scheme
from wmtp.tokenizers.chat_template import template_source

__all__ = ["Need", "check", "check_loaded", "component_problems", "is_secret", "models_beside", "required_models"]

_MODELS: Final = ("base", "ref", "rm", "critic")
_RUN_NAME: Final = re.compile(r"[\w][\w.+=@ -]*(?<! )")
_SECRET_KEY: Final = re.compile(
    r"(^|[._-])(password|passwd|secret|secret_key|api_?key|access_key|private_key|access_token|auth_token|hf_token)$",
    re.IGNORECASE,
)
#: outside addresses, which are judged by their form
_SECRET_VALUE: Final = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,})", re.IGNORECASE
)


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


def is_secret(key: str, value: str) -> bool:
    """Recognize passwords, tokens, and addresses with a query or user info."""
    return bool(_SECRET_KEY.search(key) or _SECRET_VALUE.search(value)) or holds_credentials(value)


def _problems(config: Config, registry: Registry) -> Iterator[Problem]:
    for rule in (_run, _models, _heads, _data, _length, _best, _devices, adapter_problems, fp8_problems, idle_problems):
        yield from rule(config)
    yield from _secrets(to_mapping(config), ())
    yield from component_problems(config, registry)
    yield from check_answers(config, registry)
    if config.launcher.remote:
        yield from _remote(config, registry)


def component_problems(config: Config, registry: Registry) -> Iterator[Problem]:
    """Check single components: missing inputs, and each component's own ``check()``."""
    yield from _uris(config, registry)
    if not config.launcher.remote:  # there a path is one of the other machine
        yield from model_problems(config)
    for placed in components(config):
        if not config.launcher.remote:
            yield from _packages(placed.path, placed.config)
        yield from _own_rules(placed.path, placed.config, "check", placed.config.check, registry)
    if (device := config.devices.device) != "auto":
        computes = partial(config.optimizer.check_device, device)
        yield from _own_rules(("optimizer",), config.optimizer, "check_device", computes, registry)
    if (base := config.models.get("base")) is not None and not config.launcher.remote:
        fits = partial(base.loader.check_heads, base.heads)
        yield from _own_rules(("models", "base", "heads"), base.loader, "check_heads", fits, registry)


def _packages(path: KeyPath, config: Any) -> Iterator[Problem]:
    for module, install in config.needs_packages.items():
        if find_spec(module) is None:
            yield Problem((*path, "type"), f"'{config.type}' needs {module}: pip install '{install}'")


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
    except ConfigError as error:
        yield from (Problem(path, problem) for problem in error.problems)


def _what_is_there(folder: Path) -> str | None:
    """Say what stands in the way of a folder to make.

    None where nothing but folders does.
    """
    found = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if found.is_dir():
        return None
    where = "is" if found == folder else f"is inside of {found}, which is"
    return f"{where} a file" if found.exists() else f"{where} a link to {os.readlink(found)}, which is not there"


@frozen
class Need:
    """Why a model besides ``base`` is needed.

    Args:
        trainer: the type of a trainer that needs it.
        scores_texts: it is a reward model, with a vocabulary of its own; else it reads the base model's tokens.
    """

    trainer: str
    scores_texts: bool


def required_models(config: Config) -> dict[str, Need]:
    """Map the models that trainers need besides ``base``, by section name."""
    return {
        name: Need(placed.config.type, scores_texts)
        for placed in components(config)
        if placed.kind == "trainers"
        for key, scores_texts in (("required_models", False), ("reward_models", True))
        for name in getattr(placed.config, key)
        if name != "base"
    }


def models_beside(config: Config) -> list[str]:
    """Name the models in memory besides the trained one.

    ``base`` is among them where a trainer needs it as it was at the start.
    """
    trainers = [placed.config for placed in components(config) if placed.kind == "trainers"]
    return [*required_models(config), *(["base"] if any("base" in trainer.required_models for trainer in trainers) else [])]


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
        if config.data.eval is None:
            yield Problem(path, f"'{stopping.metric}' is measured on [data.eval], which is missing", at=path[:2])
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
    elif config.data.eval is None:
        yield Problem(path, f"{best!r} is measured on [data.eval], which is missing; add it")
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


def _secrets(value: Any, path: KeyPath) -> Iterator[Problem]:
    """Report values that look like secrets.

    A table named ``secrets`` holds the names that secrets have on a service, not their values.
    """
    if isinstance(value, dict):
        for key, element in value.items():
            yield from _secrets(element, (*path, key))
    elif isinstance(value, list):
        for index, element in enumerate(value):
            yield from _secrets(element, (*path, index))
    elif isinstance(value, str) and value and is_secret("" if "secrets" in path[:-1] else str(path[-1]), value):
        yield Problem(
            path,
            "looks like a secret, which would be saved with the run; remove it, and set the environment variable that the"
            " service reads (AWS_*, MLFLOW_TRACKING_*, HF_TOKEN …); what needs a signed address, fetch by wmtp fetch first",
        )


def _uris(config: Config, registry: Registry) -> Iterator[Problem]:
    """Report URIs that name nothing, or that no backend serves.

    Every ``uri`` of a component is an input.
    """
    schemes = {scheme: provided.cls for provided in registry.of_kind("storages") for scheme in provided.cls.schemes}
    if config.checkpoints.uri is not None:
        yield from _uri(config.checkpoints.uri, ("checkpoints", "uri"), schemes, must_exist=False)
        scheme = config.checkpoints.uri.partition("://")[0].lower()
        if scheme in schemes and not schemes[scheme].holds_checkpoints:
            yield Problem(
                ("checkpoints", "uri"), f"{scheme}:// keeps no checkpoints; write a folder, or an object store (s3://…)"
            )
    if config.run.push_to is not None:
        yield from _uri(config.run.push_to, ("run", "push_to"), schemes, must_exist=False)
        if problem := unclear_target(config.run.push_to):
            yield Problem(("run", "push_to"), problem)
    is_remote = config.launcher.remote  # then a path is one of the other machine
    for placed in components(config):
        tracking = placed.config.tracking_uri if placed.kind == "trackers" else None
        if isinstance(tracking, str) and (scheme := storage_scheme(tracking, placed.config.own_schemes)):
            yield from _uri(tracking, (*placed.path, "tracking_uri"), schemes, must_exist=False)
            if scheme in schemes and not schemes[scheme].holds_checkpoints:
                yield Problem((*placed.path, "tracking_uri"), f"{scheme}:// keeps no runs; write an object store (s3://…)")
        for key in ("uri", *placed.config.uri_keys):
            uri = getattr(placed.config, key, None)
            if isinstance(uri, str):
                yield from _uri(uri, (*placed.path, key), schemes, must_exist=not is_remote)


def _uri(uri: str, path: KeyPath, schemes: dict[str, Any], *, must_exist: bool) -> Iterator[Problem]:
    try:
        backend_for(uri, schemes).check_uri(uri)
        if must_exist and scheme_of(uri) == "file" and not file_path(uri).exists():
            if (name := plain_name(uri)) is not None:
                kind = "datasets" if path[0] == "datasets" else "models"
                yield Problem(path, both_readings(uri, file_path(uri), evolve(name, kind=kind)))
                return
            relative = "" if str(file_path(uri)) == uri else f" (that is {file_path(uri)})"
            yield Problem(path, f"{uri!r}{relative} does not exist")
    except ConfigError as error:
        yield from (Problem(path, problem) for problem in error.problems)


def _own_rules(
    path: KeyPath, config: Any, method: str, check: Callable[[], Iterable[str]], registry: Registry
) -> Iterator[Problem]:
    """Run a component's own check, its method of this name; see `wmtp.plugins.hookspecs`."""
    try:
        found = check()
        if isinstance(found, str):
            raise TypeError(f"it must give one line for each problem, in a list, not the text {found!r:.60}")
        lines: Iterable[str] = list(found)
    except Exception as error:
        plugin = registry.provider(type(config))
        owner = f"the plugin {plugin}" if plugin is not None else type(config).__qualname__
        what = f"{method}() of '{config.type}' in {owner} failed: {described(error)}"
        yield Problem(path, str(plugin_failure(error) or what))
        return
    for line in lines:
        yield Problem.of_line(str(line), *path)

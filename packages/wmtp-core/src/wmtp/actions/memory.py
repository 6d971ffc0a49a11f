"""Estimates of memory and time for ``wmtp check``. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from wmtp.config.required_models import models_beside
from wmtp.config.schema import Config, HeadsConfig
from wmtp.models.base import ModelInfo
from wmtp.models.outline import outline
from wmtp.plugins.contract import ModelLoaderConfig
from wmtp.training.memory import cheaper_settings, describe_shortage, estimate_memory, too_large
from wmtp.training.speed import CARDS, describe_speed, readable_time, step_seconds

__all__ = ["outlook", "time_outlook"]


def outlook(config: Config) -> tuple[dict[str, str], list[str]]:
    """Estimate memory and speed, and warn of a likely shortage.

    The memory is that of each device, the speed that of some GPUs.

    Args:
        config: checked.

    Returns:
        a line on each by name, and the warnings.
    """
    base = config.models["base"]
    info = outline(base.loader)
    if info is None:
        text = f"no estimate: the shape of {base.loader.type} models is read by wmtp run FILE --dry-run, which estimates"
        return {"memory": text}, []
    heads = base.heads or HeadsConfig()
    world_size = _processes(config)
    names, others = _models_beside(config, {})
    estimate = estimate_memory(config, info, heads, world_size=world_size, others=others)
    text = f"{estimate}; on each of {world_size} devices" if world_size > 1 else f"{estimate}; on one device"
    if unknown := [name for name in names if name not in others]:
        text += f", without [models.{'], [models.'.join(unknown)}]"
    facts = {"memory": text}
    if config.devices.device in ("auto", "cuda"):
        facts["speed"] = describe_speed(config, info, heads, steps=config.train.max_steps, world_size=world_size, others=others)
    if config.devices.memory_gib is None:
        return facts, []
    shortage = too_large(estimate, round(config.devices.memory_gib * 2**30))
    if shortage is None:
        return facts, []
    helps = cheaper_settings(config, info, heads, world_size=world_size, others=others)
    return facts, [f"devices.memory_gib: the run is likely to run out of memory: {shortage}{describe_shortage(helps)}"]


def time_outlook(configs: Iterable[Config], unmade: Mapping[str, ModelLoaderConfig]) -> str | None:
    """Estimate how long several runs train on some GPUs.

    One after another, by their steps alone; None where a run's model or number of steps is not known.

    Args:
        configs: of the runs.
        unmade: the model that each began with whose result others read, by the URI that the result will have.
    """
    totals = dict.fromkeys(CARDS, 0.0)
    for config in configs:
        base, steps = config.models["base"], config.train.max_steps
        info = _shape(base.loader, unmade)
        if info is None or steps is None or config.devices.device not in ("auto", "cuda"):
            return None
        _, others = _models_beside(config, unmade)
        heads, processes = base.heads or HeadsConfig(), _processes(config)
        for name, card in CARDS.items():
            totals[name] += steps * step_seconds(config, info, heads, card, world_size=processes, others=others)
    return "; ".join(f"{name} about {readable_time(seconds)}" for name, seconds in totals.items())


def _processes(config: Config) -> int:
    processes = config.launcher.processes
    return processes if isinstance(processes, int) else 1


def _models_beside(config: Config, unmade: Mapping[str, ModelLoaderConfig]) -> tuple[list[str], dict[str, ModelInfo]]:
    """Name the models beside the base, and describe those of known shape."""
    names = list(models_beside(config))
    loaders = {name: config.models[name].loader for name in names if name in config.models}
    found = {name: _shape(loader, unmade) for name, loader in loaders.items()}
    return names, {name: info for name, info in found.items() if info is not None}


def _shape(loader: ModelLoaderConfig, unmade: Mapping[str, ModelLoaderConfig]) -> ModelInfo | None:
    for _ in unmade:  # each arm's model is made of another's at most once
        loader = unmade.get(getattr(loader, "uri", None) or "", loader)
    return outline(loader)

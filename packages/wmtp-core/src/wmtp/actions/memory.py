"""Memory and time that a config will need, as ``wmtp check`` says them. Imports no torch."""

from __future__ import annotations

from wmtp.config.rules import models_beside
from wmtp.config.schema import Config, HeadsConfig
from wmtp.models.outline import outline
from wmtp.training.memory import cheaper_settings, describe_shortage, estimate_memory, too_large
from wmtp.training.speed import describe_speed

__all__ = ["outlook"]


def outlook(config: Config) -> tuple[dict[str, str], list[str]]:
    """Estimate the memory of each device and the speed of some GPUs, and warn of a likely shortage.

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
    processes = config.launcher.processes
    world_size = processes if isinstance(processes, int) else 1
    names = list(models_beside(config))
    found = {name: outline(config.models[name].loader) for name in names if name in config.models}
    others = {name: other for name, other in found.items() if other is not None}
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

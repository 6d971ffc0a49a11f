"""Check a config. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from wmtp.actions.memory import outlook
from wmtp.api import load_checked
from wmtp.config.advice import unwise_settings
from wmtp.config.data_rules import eval_sources, train_sources, unread_keys
from wmtp.config.fp8_rules import fp8_misfits
from wmtp.config.load import ConfigSource, located
from wmtp.config.problems import Problem, dotted
from wmtp.config.schema import Config
from wmtp.config.tree import components
from wmtp.launchers.remote import remote_launcher
from wmtp.models.outline import outline
from wmtp.plugins import Registry
from wmtp.public import public

__all__ = ["Checked", "check"]

logger = logging.getLogger("wmtp")


@frozen(kw_only=True)
class Checked:
    """Result of `check`.

    Args:
        config: without mistakes.
        summary: a line on each part of what would run, by name.
        warnings: what is likely to fail, or to learn badly, all the same.
    """

    config: Config
    summary: Mapping[str, str]
    warnings: Sequence[str]


@public
def check(config: ConfigSource | Sequence[ConfigSource], *, overrides: Iterable[str] = ()) -> Checked:
    """Check a config, as ``wmtp check`` does.

    `wmtp.run` does the same before it starts.

    Args:
        config: a TOML file, a mapping, a `Config`, or a list of them, the later laid over the earlier.
        overrides: ``KEY=VALUE`` texts, as for ``--set``.

    Raises:
        ConfigError: every problem at once.
    """
    loaded = load_checked(config, overrides=overrides)
    base = loaded.config.models["base"]
    if (info := outline(base.loader)) is not None:
        shape = {"hidden_size": info.hidden_size, "layers": info.layers}
        misfits = [*fp8_misfits(loaded.config.devices, **shape, maps=info.linear_maps, heads=base.heads)]
        if base.lora is not None and base.lora.rank > info.hidden_size:  # one side of every map; a run asks the maps
            misfits.append(
                f"models.base.lora.rank: {base.lora.rank}, but rank {info.hidden_size} holds every change of any map of this "
                "model; lower it"
            )
        if misfits:
            raise located(loaded.document, map(Problem.of_line, misfits))
    summary = _summary(loaded.config, loaded.registry)
    estimates, warnings = outlook(loaded.config)
    summary |= estimates
    if loaded.config.launcher.remote:
        summary |= _remote_summary(loaded.config)
    warnings = [*warnings, *loaded.document.drops(), *unwise_settings(loaded.config)]
    return Checked(config=loaded.config, summary=summary, warnings=warnings)


def _summary(config: Config, registry: Registry) -> dict[str, str]:
    """Say what would run."""
    base = config.models["base"]
    heads = base.heads
    train, data = config.train, config.data.train
    limits = [f"{train.max_steps} steps"] if train.max_steps is not None else []
    if train.epochs is not None or not limits:
        limits.append(f"{train.epochs if train.epochs is not None else 1:g} epochs")
    measured = ", ".join(eval_sources(config))
    if config.data.eval is not None and config.data.eval.holdout is not None:
        measured = f"{config.data.eval.holdout:.0%} of the training documents"
    facts = {
        "run": f"{config.run.output_dir}/{config.run.name or f'{config.trainer.type}-DATE'}, seed {config.run.seed}",
        "trainer": config.trainer.type,
        "model": _with_uri(base.loader),
        "heads": f"{heads.horizon}, {heads.kind or 'of the default kind'}, trunk gradient {heads.trunk_gradient}"
        if heads is not None
        else "default",
        "adapters": "none" if base.lora is None else f"LoRA of rank {base.lora.rank} on {_words(base.lora.targets)}",
        "tokenizer": _with_uri(config.tokenizer) if config.tokenizer is not None else "the model's own",
        "data": ", ".join(f"{name} ({_with_uri(config.datasets[name])})" for name in train_sources(config)),
        "unread keys": "; ".join(f"{dotted(place)}: {', '.join(keys)}" for place, keys in unread_keys(config)) or "none",
        "evaluation": measured or "none",
        "steps": f"{' or '.join(limits)}{', whichever comes first' if len(limits) > 1 else ''}; {data.batch_size} rows of"
        f" {data.max_length} tokens each",
        "optimizer": f"{config.optimizer.type}, lr {config.optimizer.lr}, {config.schedule.type}",
        "device": f"{config.devices.device}, {config.devices.precision}",
        "tracker": config.tracker.type,
        "launcher": config.launcher.type,
    }
    providers = {str(registry.provider(type(placed.config)) or "not a plugin") for placed in components(config)}
    facts["plugins"] = ", ".join(sorted(providers))
    return facts


def _words(targets: str | Sequence[str]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _with_uri(component: Any) -> str:
    uri = component.uri
    return component.type if uri is None else f"{component.type} {uri}"


def _remote_summary(config: Config) -> dict[str, str]:
    """Describe the steps on a service, as far as known here.

    The warnings of the plan are logged.
    """
    from wmtp.startup.start import steps

    launcher = remote_launcher(config.launcher)
    plan = launcher.plan(config)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    inside = launcher.inside(config)
    placed = list(components(config))
    fsdp = config.devices.fsdp
    processes = inside.launcher.processes
    settings = [f"{processes} processes" if processes != "auto" else "a process for each GPU"]
    settings += [f"FSDP {fsdp.strategy}" if fsdp is not None else "FSDP by default", config.devices.precision]
    settings += [f"activation checkpointing {config.devices.activation_checkpointing}", f"timeout {config.devices.timeout:g} s"]
    return {
        "1 config": "every key is known, every value has its type",
        "2 paths": f"in {launcher.home} or mounted there, or a URI that is served",
        "3 components": f"{len(placed)}, all provided: {', '.join(sorted({p.config.type for p in placed}))}",
        "4 devices": ", ".join(settings),
        "5 pipeline": f"plan {plan.digest[:12]}, {len(plan.text.encode()):,} bytes; in the container:",
        **{f"  {name}": value for name, value in steps(inside, launcher.home).items()},
        **{f"on {config.launcher.type}: {name}": value for name, value in plan.facts.items()},
    }

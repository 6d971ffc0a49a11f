"""The commands: each returns its answer for ``--json`` and the exit code, and without ``--json`` prints the answer."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from wmtp.cli.facts import print_facts
from wmtp.cli.files import chosen_storage
from wmtp.cli.memory import memory_outlook
from wmtp.cli.remote import cancel, dry_run_facts, launch, logs, metrics, status
from wmtp.cli.run import outcome
from wmtp.cli.run import report as report_run
from wmtp.cli.start import start
from wmtp.config.data_rules import eval_sources, train_sources
from wmtp.config.schema import Config
from wmtp.config.tree import components
from wmtp.evaluation.consent import allow_code_execution
from wmtp.plugins import Registry, load_plugins

__all__ = ["cancel", "check", "launch", "logs", "metrics", "plugins", "report", "run", "show", "start", "status"]


def run(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp run``."""
    with allow_code_execution(arguments.allow_code_execution):
        return _run(arguments)


def _run(arguments: Namespace) -> tuple[Any, int]:
    from wmtp.api import run as run_config

    tags = [tag.strip() for tag in arguments.tags.split(",") if tag.strip()]
    if arguments.dry_run:
        facts = run_config(
            arguments.files,
            overrides=arguments.overrides,
            run_name=arguments.run_name,
            tags=tags,
            resume=arguments.resume,
            dry_run=True,
        )
        if not arguments.json:
            print_facts(dict(facts))
            print("ok: nothing was trained")
        return dict(facts), 0
    result = outcome(
        lambda: run_config(
            arguments.files, overrides=arguments.overrides, run_name=arguments.run_name, tags=tags, resume=arguments.resume
        )
    )
    return report_run(result, to_stdout=not arguments.json)


def check(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp check``."""
    from wmtp.api import load_checked

    loaded = load_checked(arguments.files, overrides=arguments.overrides)
    facts = _summary(loaded.config, loaded.registry)
    facts["memory"], warnings = memory_outlook(loaded.config)
    if loaded.config.launcher.remote:
        facts |= dry_run_facts(loaded.config)
    if not arguments.json:
        print_facts(facts)
        print("ok")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return {"ok": True, "summary": facts, "warnings": warnings}, 0


def _summary(config: Config, registry: Registry) -> dict[str, str]:
    """What would run."""
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
        "heads": f"{heads.horizon}, {heads.kind}, trunk gradient {heads.trunk_gradient}" if heads is not None else "default",
        "tokenizer": _with_uri(config.tokenizer) if config.tokenizer is not None else "the model's own",
        "data": ", ".join(f"{name} ({_with_uri(config.datasets[name])})" for name in train_sources(config)),
        "evaluation": measured or "none",
        "steps": f"{' or '.join(limits)}{', what comes first' if len(limits) > 1 else ''}; {data.batch_size} rows of"
        f" {data.max_length} tokens each",
        "optimizer": f"{config.optimizer.type}, lr {config.optimizer.lr}, {config.schedule.type}",
        "device": f"{config.devices.device}, {config.devices.precision}",
        "tracker": config.tracker.type,
        "launcher": config.launcher.type,
    }
    providers = {str(registry.provider(type(placed.config)) or "not a plugin") for placed in components(config)}
    facts["plugins"] = ", ".join(sorted(providers))
    return facts


def _with_uri(component: Any) -> str:
    uri = component.uri
    return component.type if uri is None else f"{component.type} {uri}"


def plugins(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp plugins``."""
    registry = load_plugins()
    answer = [
        {
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "status": plugin.status,
            "reason": plugin.reason,
            "components": {kind: list(names) for kind, names in plugin.components.items()},
        }
        for plugin in registry.plugins
    ]
    if not arguments.json:
        for plugin in registry.plugins:
            entry = f" (entry point {plugin.name})" if plugin.name != plugin.distribution else ""
            print(f"{plugin.distribution} {plugin.version}{entry}: {plugin.status}")
            if plugin.reason is not None:
                print(f"    {plugin.reason}")
            for kind, names in plugin.components.items():
                print(f"    {kind.replace('_', ' '):<14} {', '.join(names)}")
        if registry.left_out:
            print(f"left out by WMTP_PLUGINS: {', '.join(registry.left_out)}")
    for conflict in registry.conflicts:
        print(f"error: {conflict}", file=sys.stderr)
    return answer, 1 if registry.conflicts else 0


def show(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp show``."""
    from wmtp.cli.show import describe, unknown

    registry = load_plugins()
    found = registry.named(arguments.name)
    if not found:
        raise unknown(arguments.name, registry)
    answers = [describe(provided) for provided in found]
    if not arguments.json:
        print("\n\n".join(answer["text"] for answer in answers))
    return {"name": arguments.name, "components": answers}, 0


def report(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp report``."""
    from wmtp.report import write_report

    page = write_report(arguments.runs, arguments.output, storage=chosen_storage(arguments))
    if not arguments.json:
        print(page)
    return {"report": page}, 0

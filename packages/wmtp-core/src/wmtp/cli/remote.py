"""The commands for runs on a service."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from wmtp.cli.facts import print_facts
from wmtp.config.schema import Config
from wmtp.config.tree import components
from wmtp.launchers.base import LaunchPlan, RemoteLauncher, RunState
from wmtp.launchers.remote import find_launched, remote_launcher, submit
from wmtp.runs.records import Record

__all__ = ["cancel", "dry_run_facts", "launch", "logs", "metrics", "status"]

logger = logging.getLogger("wmtp")


def launch(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp launch``."""
    from wmtp.api import load_checked

    overrides = [*arguments.overrides, *([f"launcher.type={arguments.on}"] if arguments.on else [])]
    config = load_checked(arguments.files, overrides=overrides).config
    launcher = remote_launcher(config.launcher)
    plan = launcher.plan(config)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    answer = {"launcher": config.launcher.type, "digest": plan.digest, "warnings": plan.warnings}
    if arguments.dry_run != "server":
        _print(plan, to_stdout=arguments.dry_run is not None and not arguments.json)
    if arguments.dry_run == "local":
        return answer | {"plan": plan.text}, 0
    for remark in launcher.validate(config, plan):
        logger.warning("%s", remark)
    if arguments.dry_run is not None:
        if not arguments.json:
            _print(plan, to_stdout=True)
        print("ok: the service would take it; nothing was sent to run", file=sys.stderr)
        return answer | {"plan": plan.text}, 0
    record = submit(config, launcher, plan, again=arguments.again)
    run = str(record.run)
    answer |= {"run": run, "sha256": record.sha256, "git": record.git, **record.details}
    if not arguments.json:
        print_facts({"run": run, **plan.facts, "follow": f"wmtp logs {run} --follow", "stop": f"wmtp cancel {run}"})
    if arguments.watch:
        for line in launcher.logs(run, tail=None, follow=True):
            print(line, flush=True)
        return _ended(answer, launcher, run)
    return answer, 0


def _print(plan: LaunchPlan, *, to_stdout: bool) -> None:
    """What will be sent: for a dry run it is the answer, else what is shown before."""
    print(plan.text.rstrip("\n"), file=sys.stdout if to_stdout else sys.stderr)


def _ended(answer: Mapping[str, Any], launcher: RemoteLauncher, run: str) -> tuple[Any, int]:
    """How a run that was watched has ended."""
    status = launcher.status(run)
    reason = f": {status.reason}" if status.reason else ""
    print(f"run {run}: {status.word}{reason}", file=sys.stderr)
    return {**answer, "state": status.state.value, "reason": status.reason}, 0 if status.state is RunState.SUCCEEDED else 1


def dry_run_facts(config: Config) -> dict[str, str]:
    """What ``wmtp check`` says of a config for a service, step by step: all that can be told here, without a GPU.

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


def status(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp status``."""
    launcher, run, record = find_launched(arguments.run, arguments.config)
    found = launcher.status(run)
    facts = {
        "run": run,
        "state": found.word if found.word == found.state.value else f"{found.state.value} ({found.word})",
        "reason": found.reason,
        "url": found.url,
        **_recorded(record),
    }
    if not arguments.json:
        print_facts(facts)
    return facts | {"state": found.state.value, "word": found.word}, 0


def _recorded(record: Record | None) -> dict[str, Any]:
    if record is None:
        return {}
    commit = f"{record.git['commit']}{' and changes' if record.git.get('changed') else ''}" if record.git else None
    return {"name": record.name, "launched": record.submitted, "commit": commit, "plan": record.digest[:12], **record.details}


def logs(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp logs``."""
    launcher, run, _ = find_launched(arguments.run, arguments.config)
    lines: list[str] = []
    for line in launcher.logs(run, tail=arguments.tail, follow=arguments.follow):
        if arguments.json:
            lines.append(line)
        else:
            print(line, flush=True)
    return {"run": run, "lines": lines}, 0


def cancel(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp cancel``."""
    launcher, run, _ = find_launched(arguments.run, arguments.config)
    before = launcher.status(run)
    if before.state.is_over:
        print(f"run {run} is over already: {before.word}", file=sys.stderr)
        return {"run": run, "state": before.state.value}, 0
    launcher.cancel(run)
    after = launcher.status(run)
    if not arguments.json:
        print(f"run {run}: {after.word}")
    return {"run": run, "state": after.state.value, "word": after.word}, 0


def metrics(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp metrics``."""
    from wmtp.launchers.samples import latest_sample

    launcher, run, _ = find_launched(arguments.run, arguments.config)
    service = dict(launcher.metrics(run))
    own = latest_sample(launcher.logs(run, tail=_SAMPLED_LINES, follow=False))
    if not arguments.json:
        print_facts({f"service  {name}": f"{value:.4g}" for name, value in service.items()})
        print_facts({f"run      {name}": f"{value:.4g}" for name, value in own.items()})
        if not service and not own:
            print("no measurements yet", file=sys.stderr)
    return {"run": run, "service": service, "own": own}, 0


_SAMPLED_LINES = 1000

"""Commands for runs on a service."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from wmtp.actions import services
from wmtp.cli.facts import print_facts
from wmtp.launchers.base import LaunchPlan, RunState
from wmtp.runs.records import Record

__all__ = ["cancel", "launch", "logs", "metrics", "status"]


def launch(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp launch``."""
    shown_on_stdout = arguments.dry_run is not None and not arguments.json
    done = services.launch(
        arguments.files,
        overrides=arguments.overrides,
        on=arguments.on,
        dry_run=arguments.dry_run,
        again=arguments.again,
        on_plan=lambda plan: None if arguments.dry_run == "server" else _print(plan, to_stdout=shown_on_stdout),
    )
    answer = {"launcher": done.launcher, "digest": done.plan.digest, "warnings": done.plan.warnings}
    if arguments.dry_run == "server":
        if not arguments.json:
            _print(done.plan, to_stdout=True)
        print("ok: the service would take it; nothing was sent to run", file=sys.stderr)
    if done.run is None or done.record is None:
        return answer | {"plan": done.plan.text}, 0
    run = done.run
    answer |= {"run": run, "sha256": done.record.sha256, "git": done.record.git, **done.record.details}
    if not arguments.json:
        print_facts({"run": run, **done.plan.facts, "follow": f"wmtp logs {run} --follow", "stop": f"wmtp cancel {run}"})
    if arguments.watch:
        for line in services.logs(run, follow=True):
            print(line, flush=True)
        return _ended(answer, run)
    return answer, 0


def _print(plan: LaunchPlan, *, to_stdout: bool) -> None:
    """Print a plan, on standard output where it is the answer."""
    print(plan.text.rstrip("\n"), file=sys.stdout if to_stdout else sys.stderr)


def _ended(answer: Mapping[str, Any], run: str) -> tuple[Any, int]:
    """Say how a run that was watched has ended."""
    status = services.status(run).status
    reason = f": {status.reason}" if status.reason else ""
    print(f"run {run}: {status.word}{reason}", file=sys.stderr)
    return {**answer, "state": status.state.value, "reason": status.reason}, 0 if status.state is RunState.SUCCEEDED else 1


def status(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp status``."""
    launched = services.status(arguments.run, config=arguments.config)
    found = launched.status
    facts = {
        "run": launched.run,
        "state": found.word if found.word == found.state.value else f"{found.state.value} ({found.word})",
        "reason": found.reason,
        "url": found.url,
        **_recorded(launched.record),
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
    from wmtp.launchers.remote import find_launched

    lines: list[str] = []
    for line in services.logs(arguments.run, config=arguments.config, tail=arguments.tail, follow=arguments.follow):
        if arguments.json:
            lines.append(line)
        else:
            print(line, flush=True)
    return {"run": find_launched(arguments.run, arguments.config)[1], "lines": lines}, 0


def cancel(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp cancel``."""
    done = services.cancel(arguments.run, config=arguments.config)
    if done.was_over:
        print(f"run {done.run} is over already: {done.status.word}", file=sys.stderr)
        return {"run": done.run, "state": done.state.value}, 0
    if not arguments.json:
        print(f"run {done.run}: {done.status.word}")
    return {"run": done.run, "state": done.state.value, "word": done.status.word}, 0


def metrics(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp metrics``."""
    found = services.metrics(arguments.run, config=arguments.config)
    if not arguments.json:
        print_facts({f"service  {name}": f"{value:.4g}" for name, value in found.service.items()})
        print_facts({f"run      {name}": f"{value:.4g}" for name, value in found.own.items()})
        if not found.service and not found.own:
            print("no measurements yet", file=sys.stderr)
    return {"run": found.run, "service": found.service, "own": found.own}, 0

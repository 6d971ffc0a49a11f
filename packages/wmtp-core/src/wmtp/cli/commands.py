"""Commands: each returns its ``--json`` answer and exit code, and otherwise prints."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

import attrs

from wmtp.cli.facts import print_documents, print_facts
from wmtp.cli.remote import cancel, launch, logs, metrics, status
from wmtp.cli.run import outcome
from wmtp.cli.run import report as report_run
from wmtp.cli.start import start
from wmtp.plugins import load_plugins

__all__ = ["cancel", "check", "launch", "logs", "metrics", "plugins", "report", "run", "show", "start", "status"]


def run(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp run``."""
    from wmtp.api import run

    options: dict[str, Any] = {
        "overrides": arguments.overrides,
        "run_name": arguments.run_name,
        "tags": [tag.strip() for tag in arguments.tags.split(",") if tag.strip()],
        "resume": arguments.resume,
        "allow_code_execution": arguments.allow_code_execution,
    }
    if arguments.dry_run:
        facts = dict(run(arguments.files, dry_run=True, **options))
        documents = facts.pop("documents")
        if not arguments.json:
            print_facts(facts)
            print_documents(documents)
            print("ok: nothing was trained")
        return {**facts, "documents": [attrs.asdict(document) for document in documents]}, 0
    result = outcome(lambda: run(arguments.files, **options))
    return report_run(result, to_stdout=not arguments.json)


def check(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp check``."""
    from wmtp.actions.check import check

    found = check(arguments.files, overrides=arguments.overrides)
    if not arguments.json:
        print_facts(found.summary)
        print("ok")
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return {"ok": True, "summary": found.summary, "warnings": found.warnings}, 0


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
    from wmtp.actions.components import show

    answers = show(arguments.name)
    if not arguments.json:
        print("\n\n".join(answer["text"] for answer in answers))
    return {"name": arguments.name, "components": answers}, 0


def report(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp report``."""
    from wmtp.actions.models import report

    page = report(arguments.runs, arguments.output, config=arguments.config, overrides=arguments.overrides)
    if not arguments.json:
        print(page)
    return {"report": page}, 0

"""``wmtp start``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from wmtp.cli.facts import print_facts
from wmtp.cli.run import outcome, report

__all__ = ["start"]


def start(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp start``."""
    from wmtp.startup.start import start

    if arguments.dry_run:
        facts = start(arguments.files, arguments.overrides, dry_run=True)
        if not arguments.json:
            print_facts(facts)
            print("ok: nothing was fetched or trained")
        return facts, 0
    result = outcome(lambda: start(arguments.files, arguments.overrides))
    return report(result, to_stdout=not arguments.json)

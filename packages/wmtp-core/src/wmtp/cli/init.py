"""``wmtp init``."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import attrs

from wmtp.cli.facts import print_facts

__all__ = ["add_arguments", "write_recipe"]


def add_arguments(add: Callable[..., ArgumentParser]) -> None:
    """Describe the command to argparse."""
    command = add("init", "Write a commented recipe that runs as it is, with a few lines of sample data.")
    command.set_defaults(run_command=write_recipe)
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="its name, as quickstart; without one all are listed")
    command.add_argument("folder", metavar="DIR", nargs="?", help="where to; default: the recipe's name")


def write_recipe(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp init``."""
    from wmtp.actions.init import init, recipes

    if arguments.recipe is None:
        if not arguments.json:
            print_facts(recipes())
        return {"recipes": recipes()}, 0
    done = init(arguments.recipe, arguments.folder)
    if not arguments.json:
        for file in done.files:
            print(file)
        print(f"next: cd {shlex.quote(str(done.folder))} && {done.command}")
    return attrs.asdict(done), 0

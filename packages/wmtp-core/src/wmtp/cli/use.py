"""Commands that use a trained model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import attrs

from wmtp.cli.distill import add_arguments as add_distill
from wmtp.cli.files import storage_options
from wmtp.cli.generate import add_arguments as add_generate
from wmtp.exporting import FORMATS

__all__ = ["add_arguments", "export"]

_MODEL_HELP = "a run directory, a model folder, a .gguf file, or a URI of one"


def add_arguments(add: Callable[..., ArgumentParser]) -> None:
    """Describe the commands to argparse.

    Args:
        add: makes the parser of a command from its name and a line about it.
    """
    add_generate(add, _MODEL_HELP)
    add_distill(add, _MODEL_HELP)
    command = add("export", "Write a model in the layout of other tools, with a model card.", storage_options())
    command.set_defaults(run_command=export)
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument("folder", metavar="DIR", help="a folder that is not there yet, or is empty")
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    command.add_argument(
        "--checkpoint", metavar="best|last|STEP", help="of a run, in place of its model: a checkpoint that it has kept"
    )
    command.add_argument("--format", required=True, choices=tuple(FORMATS), help=formats)


def export(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp export``."""
    from wmtp.actions.models import export

    done = export(
        arguments.model,
        arguments.folder,
        format=arguments.format,
        checkpoint=arguments.checkpoint,
        config=arguments.config,
        overrides=arguments.overrides,
    )
    if not arguments.json:
        for name, size in done.files.items():
            print(f"{size:>14,}  {done.folder / name}")
    return attrs.asdict(done), 0

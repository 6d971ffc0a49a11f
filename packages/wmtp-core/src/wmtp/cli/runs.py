"""Command for tracked runs: ``wmtp runs pull``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import Any

import attrs

__all__ = ["add_arguments", "runs"]


def add_arguments(add: Callable[..., argparse.ArgumentParser], options: argparse.ArgumentParser) -> None:
    """Describe the command to argparse.

    Args:
        add: adds a command.
        options: what commands with a URI have in common.
    """
    command = add("runs", "Bring the runs that were tracked to an object store into one database, for mlflow ui.", options)
    command.set_defaults(run_command=runs)
    command.add_argument("action", choices=("pull",))
    command.add_argument("uri", metavar="URI", help="what was tracker.tracking_uri, as s3://BUCKET/mlruns")
    command.add_argument(
        "--into", metavar="FILE", default="runs/mlflow.db", help="the SQLite database; default: runs/mlflow.db"
    )


def runs(arguments: argparse.Namespace) -> tuple[Any, int]:
    """``wmtp runs pull``."""
    from wmtp.actions.files import pull_runs

    done = pull_runs(arguments.uri, arguments.into, config=arguments.config, overrides=arguments.overrides)
    if not arguments.json:
        print(f"{done.database}: {len(done.new)} new runs, {len(done.changed)} updated, {done.unchanged} unchanged")
        print(f"mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{done.database}')}")
    return attrs.asdict(done), 0

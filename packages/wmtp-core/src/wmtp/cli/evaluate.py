"""``wmtp eval``."""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from wmtp.distributed.environment import Worker

__all__ = ["add_arguments", "evaluate"]

logger = logging.getLogger("wmtp")


def add_arguments(add: Callable[..., ArgumentParser], config: ArgumentParser) -> None:
    """Describe the command to argparse.

    Args:
        add: makes the parser of a command from its name and a line about it.
        config: the arguments for TOML files and ``--set``.
    """
    command = add("eval", "Measure a trained model with the evaluators of [[eval]].", config)
    command.set_defaults(run_command=evaluate)
    command.usage = "wmtp eval RUN_OR_MODEL [FILE ...] [--set KEY=VALUE]"
    command.add_argument("--output", metavar="DIR", help="where results go; default: the run, or evaluations/NAME for a model")
    command.add_argument(
        "--allow-code-execution", action="store_true", help="let code that the model writes run, in a sandbox (pass-at-k)"
    )


def evaluate(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp eval``, measured by rank 0 where torchrun has started several processes.

    The other processes end at once.
    """
    worker = Worker.of()
    if worker is not None and worker.world_size > 1:
        if worker.rank:
            return {}, 0
        logger.info("wmtp eval measures in one process: rank 0 does, and the other %d end", worker.world_size - 1)
    from wmtp.actions.models import evaluate

    found = evaluate(
        arguments.files[0],
        arguments.files[1:],
        overrides=arguments.overrides,
        output=arguments.output,
        allow_code_execution=arguments.allow_code_execution,
    )
    if not arguments.json:
        width = max(map(len, found.numbers), default=0)
        for name, value in found.numbers.items():
            print(f"{name:<{width}}  {value:.4g}")
        print(f"{'results':<{width}}  {found.folder}")
    return {"model": found.model, "folder": found.folder, "metrics": dict(found.numbers)}, 0

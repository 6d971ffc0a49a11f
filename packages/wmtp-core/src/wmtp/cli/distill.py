"""``wmtp distill-data``: a model's own text as training data."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import attrs

from wmtp.cli.files import storage_options
from wmtp.cli.generate import add_decoding, count, speculation

__all__ = ["add_arguments", "distill_data"]


def add_arguments(add: Callable[..., ArgumentParser], model_help: str) -> None:
    """Describe the command to argparse.

    Args:
        add: makes the parser of a command from its name and a line about it.
        model_help: about the argument MODEL.
    """
    text = "Write what a model says to prompts, as data to train its heads on; go on where it broke off."
    command = add("distill-data", text, storage_options())
    command.set_defaults(run_command=distill_data)
    command.add_argument("model", metavar="MODEL", help=model_help)
    command.add_argument(
        "prompts", nargs="+", metavar="FILE", help='data files whose records have a "prompt" or "messages", or URIs of some'
    )
    command.add_argument("--output", required=True, metavar="FILE.jsonl", help="where the answers are written; may be a URI")
    command.add_argument("--max-new-tokens", type=count, default=512, metavar="N", help="of an answer; default 512")
    command.add_argument("--batch-size", type=count, default=32, metavar="N", help="prompts at once; default 32")
    command.add_argument("--limit", type=count, metavar="N", help="only the first so many prompts")
    command.add_argument(
        "--template",
        choices=("auto", "none"),
        default="auto",
        help="none: continue the text of prompts, although the model has a chat template",
    )
    add_decoding(command)


def distill_data(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp distill-data``."""
    from wmtp.actions.distill import distill_data

    done = distill_data(
        arguments.model,
        arguments.prompts,
        arguments.output,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        template=arguments.template,
        limit=arguments.limit,
        speculative=speculation(arguments),
        compiled=arguments.compile,
        device=arguments.device,
        precision=arguments.precision,
        config=arguments.config,
        overrides=arguments.overrides,
    )
    if not arguments.json:
        print(f'{done.output}: {done.found + done.written:,} of {done.prompts:,} answers; read it with type = "{done.dataset}"')
    print(f"{done.written:,} answers, {done.tokens:,} tokens in {done.seconds:.1f} s", file=sys.stderr)
    return attrs.asdict(done), 0

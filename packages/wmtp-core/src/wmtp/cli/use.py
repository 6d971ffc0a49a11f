"""Commands that use a trained model."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from wmtp.cli.files import storage_options
from wmtp.errors import ConfigError
from wmtp.exporting import FORMATS

__all__ = ["add_arguments", "export", "generate"]

_MODEL_HELP = "a run directory, a model folder, a .gguf file, or a URI of one"


def add_arguments(add: Callable[..., ArgumentParser]) -> None:
    """Describe the commands to argparse.

    Args:
        add: makes the parser of a command from its name and a line about it.
    """
    command = add("generate", "Continue a text with a model.", storage_options())
    command.set_defaults(run_command=generate)
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    command.add_argument("--prompt-file", metavar="FILE", help="a file with it; - reads standard input")
    command.add_argument("--max-new-tokens", type=_count, default=128, metavar="N", help="default 128")
    command.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the most probable token")
    command.add_argument("--top-p", type=float, default=1.0, help="of nucleus sampling; default 1")
    command.add_argument("--seed", type=int, default=0, help="of the draws; default 0")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    command.add_argument("--speculative", action="store_true", help="let heads 2..H draft: the same text, sooner")
    _add_place(command)
    command = add("export", "Write a model in the layout of other tools, with a model card.", storage_options())
    command.set_defaults(run_command=export)
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument("folder", metavar="DIR", help="a folder that is not there yet, or is empty")
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    command.add_argument("--format", required=True, choices=tuple(FORMATS), help=formats)


def _add_place(command: ArgumentParser) -> None:
    command.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto")
    command.add_argument("--precision", choices=("fp32", "bf16"), help="of the parameters; default: as saved")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def generate(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp generate``."""
    from wmtp.actions.generate import generate

    found = generate(
        arguments.model,
        _prompt(arguments),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=arguments.stop,
        speculative=arguments.speculative,
        device=arguments.device,
        precision=arguments.precision,
        on_text=None if arguments.json else lambda text: print(text, end="", flush=True),
        config=arguments.config,
        overrides=arguments.overrides,
    )
    if not arguments.json:
        print()
    per_forward = found.tokens_per_forward if found.speculative else None
    print(
        f"{len(found.tokens)} tokens in {found.seconds:.2f} s" + (f", {per_forward:.2f} a forward pass" if per_forward else ""),
        file=sys.stderr,
    )
    return attrs.asdict(found), 0


def _prompt(arguments: Namespace) -> str:
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise ConfigError("give either --prompt TEXT or --prompt-file FILE")
    if arguments.prompt is not None:
        return arguments.prompt
    try:
        return sys.stdin.read() if arguments.prompt_file == "-" else Path(arguments.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {arguments.prompt_file}: cannot be read as text: {error}") from None


def export(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp export``."""
    from wmtp.actions.models import export

    done = export(
        arguments.model, arguments.folder, format=arguments.format, config=arguments.config, overrides=arguments.overrides
    )
    if not arguments.json:
        for name, size in done.files.items():
            print(f"{size:>14,}  {done.folder / name}")
    return attrs.asdict(done), 0

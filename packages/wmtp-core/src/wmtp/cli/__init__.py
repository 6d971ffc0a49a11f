"""Command line, whose commands import their code when they run.

So ``wmtp --help`` is quick.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from wmtp.cli import evaluate, init, study, use
from wmtp.cli import files as file_commands
from wmtp.cli.parser import Parser
from wmtp.cli.streams import (
    NOT_WRITTEN,
    accepts_output,
    escape_other_characters,
    has_every_character,
    is_closed,
    open_closed_streams,
)
from wmtp.errors import ConfigError, PluginError, Terminated, WMTPError, described
from wmtp.log_lines import set_up_logging
from wmtp.redaction import redact
from wmtp.signals import stopped_by_sigterm

__all__ = ["main", "make_parser", "run_from_shell"]

#: arguments without a flag of which a command takes any number
_SEVERAL = ("files", "words", "runs", "prompts")

#: what wmtp-core[train] installs and wmtp-core alone does not
_OF_TRAIN = ("huggingface_hub", "mlflow", "numpy", "safetensors", "sentencepiece", "torch", "transformers")


def run_from_shell() -> NoReturn:
    """Run `main` and end the process, for the shell command ``wmtp``.

    The interpreter does all that it does at its end except to take itself apart: threads of native libraries that still have
    something to hand over (a request that Ctrl-C cancelled) would abort the process then, in place of its exit code.
    """
    open_closed_streams()
    escape_other_characters()
    code = 1  # of an unexpected error, which Python has printed

    def leave() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # the first that is registered is the last that is called
    code = main()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0 done; 1 the work failed; 2 the input is wrong; 3 a service refuses the user; 4 a service fails; 130 interrupted by
        Ctrl-C (SIGINT); 143 ended by SIGTERM.
    """
    output = sys.stdout
    code = 0
    try:
        try:
            arguments = _parse(argv)
        except SystemExit as stop:  # argparse has printed its message
            code = int(stop.code or 0)
            output.flush()
            return code
        wants_json: bool = arguments.json
        set_up_logging(verbose=arguments.verbose, rank=_rank())
        # whatever a library prints must not get between the braces
        with contextlib.ExitStack() as stack:
            if _rank():  # rank 0 says it all
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            elif wants_json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            if "LOCAL_RANK" not in os.environ:  # else a launcher ends it, and must not wait for a collective
                stack.enter_context(stopped_by_sigterm())
            answer, code = _run_command(arguments)
        if wants_json and not _rank():
            print(json.dumps(_plain(answer), ensure_ascii=not has_every_character(output)), file=output)
        output.flush()
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and not output.closed:  # a plugin may have closed it
            raise
        # for instance `wmtp show … | head`: who reads has had enough, and the work is as good as it was
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                print(f"error: standard output: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            code = code or 1
    return code


def _run_command(arguments: argparse.Namespace) -> tuple[Any, int]:
    """Run a command: its answer for ``--json``, and the exit code."""
    try:
        _require_folder()
        command = getattr(arguments, "run_command", None)
        if command is None:
            from wmtp.cli import commands

            command = getattr(commands, arguments.command)
        return command(arguments)
    except (KeyboardInterrupt, SystemExit, Exception) as error:
        error = _not_installed(error) or error
        origin = error.__cause__ if isinstance(error, PluginError) and error.__cause__ is not None else error
        if isinstance(origin, BrokenPipeError) and (is_closed(sys.stdout) or is_closed(sys.stderr)):
            raise origin from None
        if isinstance(origin, OSError) and origin.errno in NOT_WRITTEN and not accepts_output(sys.stdout):
            raise origin from None
        from wmtp.plugins.failures import plugin_failure

        error = plugin_failure(error) or error
        lines, code = _explained(error)
        lines = [redact(_with_origin(line)) for line in lines]
        if getattr(error, "said_by_main", False):  # rank 0 has the same error
            return {"error": "\n".join(lines), "problems": lines}, code
        if arguments.debug:
            print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        elif not isinstance(origin, KeyboardInterrupt | WMTPError) and getattr(origin, "filename", None) is None:
            print("run it again with --debug for the traceback of this error:", file=sys.stderr)
    rank = f"rank {_rank()}: " if _rank() else ""
    with contextlib.suppress(OSError):  # the exit code says it too
        for line in lines:
            print(f"error: {rank}{line}", file=sys.stderr)
    return {"error": "\n".join(lines), "problems": lines}, code


def _not_installed(error: BaseException) -> ConfigError | None:
    """Explain that wmtp-core alone has no torch; None for other errors."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in _OF_TRAIN:
        return None
    explained = ConfigError(f"{error.name} is not installed, which this needs: pip install 'wmtp-core[train]'")
    explained.__cause__ = error
    return explained


def _require_folder() -> None:
    """Refuse to work in a folder that has been removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current folder is gone: cd to one that exists, and try again") from None


def _explained(error: BaseException) -> tuple[list[str], int]:
    """Explain an error: the lines to print, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted"], 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    if isinstance(error, SystemExit):  # of a plugin; its code may be 0, as if the work were done
        return [f"the work was ended by sys.exit({error.code!r})"], 1
    if isinstance(error, ConfigError):
        return list(error.problems), error.exit_code
    if isinstance(error, WMTPError):
        return str(error).splitlines() or [type(error).__name__], error.exit_code
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return [f"{os.fspath(error.filename)!s}: {error.strerror}"], 1
    return [described(error)], 1


def _with_origin(line: str) -> str:
    """Add the URI that a path in the cache was fetched from."""
    from wmtp.storage.cache import origin

    uri = origin(line)
    return line if uri is None or uri in line else f"{line} (fetched from {uri})"


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Make the parser of the command line, and each command's by name."""
    parser = Parser(
        prog="wmtp",
        description="Weighted multi-token-prediction fine-tuning of language models.",
        epilog="Exit codes: 0 done, 1 the work failed, 2 the input is wrong; of a service to launch on: 3 it refuses the user,"
        " 4 it fails; 130 interrupted by Ctrl-C (SIGINT), 143 ended by SIGTERM: a run has saved a checkpoint then.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands: Any = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, everything else on standard error"
    )
    common.add_argument("--verbose", action="store_true", help="say more")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("files", nargs="*", metavar="FILE", help="TOML files; the later are laid over the earlier")
    config.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="as optimizer.lr=1e-5; laid over the files",
    )

    def add(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[*parents, common], allow_abbrev=False)

    init.add_arguments(add)
    run = add("run", "Train by a config.", config)
    run.add_argument("--run-name", metavar="NAME", help="the run's name, and that of its directory")
    run.add_argument("--tags", default="", metavar="A,B", help="words for the tracker, besides run.tags")
    run.add_argument("--resume", metavar="RUN_DIR|auto", help="resume a run: this one, or the one with this name or config")
    run.add_argument("--dry-run", action="store_true", help="everything but the training steps")
    run.add_argument(
        "--allow-code-execution", action="store_true", help="let [[eval]] run code that the model writes, in a sandbox"
    )
    study.add_arguments(add)
    start = add("start", "In a container: fetch what the config names, check it, and train on all devices.", config)
    start.add_argument("--dry-run", action="store_true", help="only say what would be done")
    add("check", "Check the config, as run does before it starts.", config)
    add("plugins", "List the plugins, what they provide, and which are broken.")
    show = add("show", "Show a component's documentation, and its TOML with the defaults.")
    show.add_argument("name", metavar="NAME", help='as in `type = "NAME"`')
    options = file_commands.storage_options()
    report = add("report", "Write one HTML page that shows a run, or compares several.", options)
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directories, of runs in any state; or their checkpoints.uri"
    )
    report.add_argument(
        "--output",
        metavar="FILE",
        help="the page; default: report.html in the run directory, of several runs or of a URI in this folder",
    )
    _add_remote(add, config)

    evaluate.add_arguments(add, config)
    use.add_arguments(add)
    file_commands.add_arguments(add)
    return parser, commands.choices


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser, commands = make_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["launch"]:  # an option with an optional value would consume the file after it
        words = ["--dry-run-server" if word == "--dry-run=server" else word for word in words]
    arguments, rest = parser.parse_known_args(words)
    # argparse takes no files after the first option behind them
    files: list[str] | None = next((getattr(arguments, name) for name in _SEVERAL if hasattr(arguments, name)), None)
    unknown = next((word for word in rest if files is None or word.startswith("-")), None)
    if unknown is not None:
        commands[arguments.command].error(f"unrecognized argument: {unknown}")
    if files is not None:
        files += rest
    if hasattr(arguments, "files") and not arguments.files and getattr(arguments, "resume", None) in (None, "auto"):
        if arguments.command == "start":  # its config may be in the environment
            return arguments
        wanted = "a run, a model folder or a .gguf file" if arguments.command == "eval" else "a TOML file"
        commands[arguments.command].error(f"name {wanted}")
    return arguments


def _add_remote(add: Callable[..., argparse.ArgumentParser], config: argparse.ArgumentParser) -> None:
    """Describe the commands for runs on a service."""
    launch = add("launch", "Hand a run to a service, having shown what is sent.", config)
    launch.add_argument("--on", metavar="NAME", help="the launcher; default: what [launcher] says")
    launch.add_argument(
        "--dry-run",
        action="store_const",
        const="local",
        help="only print what would be sent; --dry-run=server also asks the service whether it would take it",
    )
    launch.add_argument("--dry-run-server", action="store_const", const="server", dest="dry_run", help=argparse.SUPPRESS)
    launch.add_argument("--watch", action="store_true", help="print its log until it is over; fails where the run fails")
    launch.add_argument("--again", action="store_true", help="also where the same plan is running already")
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("run", metavar="RUN", help="the id that wmtp launch printed, or run.name")
    known.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="a TOML file with [launcher], for a run from elsewhere"
    )
    add("status", "Show the state of a launched run.", known)
    logs = add("logs", "Print the log of a launched run.", known)
    logs.add_argument("--follow", "-f", action="store_true", help="continue until the run is over")
    logs.add_argument("--tail", type=_natural, metavar="N", help="only the last N lines of what there is")
    add("cancel", "End a launched run.", known)
    add("metrics", "Show the machine load of a launched run, from the service and from the run itself.", known)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines")
    return int(text)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import wmtp

        print(f"wmtp {wmtp.__version__}")
        parser.exit()


def _rank() -> int:
    """Return this process's rank under torchrun; 0 without torchrun."""
    number = os.environ.get("RANK", "")
    return int(number) if os.environ.get("LOCAL_RANK") and number.isdecimal() else 0


def _plain(value: Any) -> Any:
    """Convert a value to what JSON can hold.

    Paths become text; NaN and infinity become null.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else redact(str(value))

"""``wmtp generate``: continue a text, answer a message, or talk."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from wmtp.cli.files import storage_options
from wmtp.errors import ConfigError
from wmtp.spelling import is_text

if TYPE_CHECKING:
    from wmtp.actions.generate import Generated, Writer

__all__ = ["add_arguments", "add_decoding", "count", "generate"]


def add_arguments(add: Callable[..., ArgumentParser], model_help: str) -> None:
    """Describe the command to argparse.

    Args:
        add: makes the parser of a command from its name and a line about it.
        model_help: about the argument MODEL.
    """
    command = add("generate", "Continue a text with a model, or talk to it.", storage_options())
    command.set_defaults(run_command=generate)
    command.add_argument("model", metavar="MODEL", help=model_help)
    command.add_argument("--prompt", metavar="TEXT", help="the text to continue; with --chat what you say")
    command.add_argument("--prompt-file", metavar="FILE", help="a file with it; - reads standard input")
    command.add_argument(
        "--chat",
        action="store_true",
        help="answer by the model's chat template; without a prompt: a conversation, line by line",
    )
    command.add_argument("--system", metavar="TEXT", help="with --chat: a system's message before all others")
    command.add_argument("--max-new-tokens", type=count, metavar="N", help="default 128, with --chat 512")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    add_decoding(command)


def add_decoding(command: ArgumentParser) -> None:
    """Add the options of every command that decodes."""
    command.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the most probable token")
    command.add_argument("--top-p", type=float, default=1.0, help="of nucleus sampling; default 1")
    command.add_argument("--seed", type=int, default=0, help="of the draws; default 0")
    command.add_argument("--speculative", action="store_true", help="let heads 2..H draft: the same text, sooner")
    command.add_argument("--drafts", type=count, metavar="N", help="let only the first N of them draft")
    command.add_argument("--compile", action="store_true", help="compile the layers: on a GPU, for many tokens")
    command.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default auto")
    command.add_argument("--precision", choices=("fp32", "bf16"), help="of the parameters; default: as saved")


def speculation(arguments: Namespace) -> bool | int:
    """Combine the options of drafting."""
    if arguments.drafts is not None and not arguments.speculative:
        raise ConfigError("--drafts: has no effect without --speculative")
    return arguments.drafts or arguments.speculative


def count(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def generate(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp generate``."""
    from wmtp.actions.generate import conversation, open_writer

    _check_texts(arguments)
    prompt = _prompt(arguments)
    if arguments.system is not None and not arguments.chat:
        raise ConfigError("--system: has no effect without --chat")
    writer = open_writer(
        arguments.model,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=arguments.stop,
        speculative=speculation(arguments),
        compiled=arguments.compile,
        device=arguments.device,
        precision=arguments.precision,
        config=arguments.config,
        overrides=arguments.overrides,
    )
    on_text = None if arguments.json else lambda text: print(text, end="", flush=True)
    if prompt is None:
        return {"messages": _talk(writer, conversation([], arguments.system), on_text)}, 0
    if arguments.chat:
        found = writer.answer(conversation(prompt, arguments.system), on_text)
    else:
        _say_template(writer, prompt)
        found = writer.complete(prompt, on_text)
    if not arguments.json:
        print()
    _print_speed(found)
    return attrs.asdict(found), 0


def _check_texts(arguments: Namespace) -> None:
    """Refuse bytes that are no text, as from another terminal."""
    texts = [("--prompt", arguments.prompt), ("--system", arguments.system), *(("--stop", text) for text in arguments.stop)]
    for flag, text in texts:
        if text is not None and not is_text(text):
            raise ConfigError(f"{flag}: {text!r} is not UTF-8 text; set the terminal to UTF-8, or use --prompt-file")


def _prompt(arguments: Namespace) -> str | None:
    """Read the prompt; None where one talks line by line."""
    if arguments.prompt is None and arguments.prompt_file is None and arguments.chat:
        return None
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise ConfigError("give either --prompt TEXT or --prompt-file FILE, or --chat alone to talk")
    file: str | None = arguments.prompt_file
    if file is None:
        return arguments.prompt
    try:
        # an editor's byte order mark is no part of the text
        return (sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt-file {file}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompt-file {file!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _talk(writer: Writer, messages: list[Any], on_text: Callable[[str], None] | None) -> list[Any]:
    """Answer line by line until input ends; return the whole conversation."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("a line is a message; Ctrl-D ends", file=sys.stderr)
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return messages
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        found = writer.answer(messages, on_text)
        messages.append({"role": "assistant", "content": found.text})
        if on_text is not None:
            print()
        _print_speed(found)


def _say_template(writer: Writer, prompt: str) -> None:
    """Say that a plain prompt leaves the model's chat template unused."""
    tokenizer = writer.opened.tokenizer
    if tokenizer.chat_template is not None and not any(token in prompt for token in tokenizer.control_tokens if token):
        print("the model has a chat template, which a plain text does not use: --chat answers by it", file=sys.stderr)


def _print_speed(found: Generated) -> None:
    per_forward = found.tokens_per_forward if found.speculative else None
    print(
        f"{len(found.tokens)} tokens in {found.seconds:.2f} s" + (f", {per_forward:.2f} a forward pass" if per_forward else ""),
        file=sys.stderr,
    )

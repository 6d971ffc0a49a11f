"""``wmtp study``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from wmtp.cli.facts import print_facts

if TYPE_CHECKING:
    from wmtp.actions.study_result import StudyResult

__all__ = ["add_arguments", "study"]


def add_arguments(add: Callable[..., ArgumentParser]) -> None:
    """Describe the command to argparse."""
    command = add("study", "Train every arm of a study with every seed, as far as that is not done, and compare them.")
    command.set_defaults(run_command=study)
    command.add_argument("study", metavar="STUDY", help="a TOML file with arms, seeds and a recipe")
    command.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="laid over every run"
    )
    command.add_argument("--arms", type=_words, metavar="A,B", help="only these, and what they need")
    command.add_argument("--seeds", type=_numbers, metavar="0,1", help="only these, and what they need")
    command.add_argument("--jobs", type=int, metavar="N", help="runs at once; default: study.jobs")
    command.add_argument("--retry", action="store_true", help="also run what failed before")
    command.add_argument("--minutes", type=float, metavar="M", help="begin no run that would not be done after so long")
    command.add_argument("--dry-run", action="store_true", help="only say what would be done")
    command.add_argument(
        "--allow-code-execution", action="store_true", help="let [[eval]] run code that models write, in a sandbox"
    )


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise ArgumentTypeError(f"{text!r} is no list of seeds, as 0,1,2")
    return [int(word) for word in words]


def study(arguments: Namespace) -> tuple[Any, int]:
    """``wmtp study``."""
    from wmtp.actions.study import study

    result = study(
        arguments.study,
        overrides=arguments.overrides,
        arms=arguments.arms,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        retry=arguments.retry,
        minutes=arguments.minutes,
        dry_run=arguments.dry_run,
        allow_code_execution=arguments.allow_code_execution,
    )
    answer = {
        "folder": result.folder,
        "facts": dict(result.facts),
        "sentence": result.table.sentence(),
        "rows": result.rows,
        "notes": list(result.table.notes),
        "failed": dict(result.failed),
        "left": list(result.left),
    }
    if arguments.dry_run:
        if not arguments.json:
            print_facts(result.facts)
        return answer, 0
    if not arguments.json:
        _print(result)
    for name, reason in result.failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if result.failed:
        print("error: run what failed again with: wmtp study … --retry", file=sys.stderr)
    return answer, 1 if result.failed else 0


def _print(result: StudyResult) -> None:
    from wmtp.actions.study_result import TABLE_HEADS, left_line, text_lines

    print(result.table.sentence())
    if result.rows:
        print()
        print("\n".join(aligned([list(TABLE_HEADS), *text_lines(result.table)])))
    if result.table.notes:
        print()
    for note in result.table.notes:
        print(f"note: {note}")
    if result.left:
        print(left_line(result.left))
    if result.finished:
        print(f"page: {result.folder / 'report.html'}")


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Put cells under each other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]

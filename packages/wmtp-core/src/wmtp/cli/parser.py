"""argparse with a hint: the command, flag or value that was meant."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from wmtp.config.neighbours import known_elsewhere
from wmtp.config.own_keys import own_places
from wmtp.spelling import did_you_mean, nearest

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """Ends a complaint of argparse with what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print usage and the message with its hint, and exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {self._with_hint(message)}\n")

    def _with_hint(self, message: str) -> str:
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message, re.DOTALL):
            # Python 3.14 writes the choices without quotes
            choices = [word.strip(" '") for word in choice[2].split(",")]
            hint = did_you_mean(choice[1], choices)
            return message if hint is None else f"{message[: choice.start(2) - 14]}; {hint}"
        if flag := re.search(r"unrecognized argument: (--?[^=\s]+)", message):
            flags = [name for name in self._option_string_actions if name.startswith("--")]
            hint = _flag_hint(flag[1], flags)
            return message if hint is None else f"{message}; {hint}"
        return message


def _flag_hint(flag: str, known: Sequence[str]) -> str | None:
    """Suggest a flag or config key for an unknown flag.

    None where nothing is like it.

    Args:
        flag: as it was written.
        known: the command's flags.
    """
    word = flag.lstrip("-")
    names = [name.lstrip("-") for name in known]
    key = word.replace("-", "_")
    close = nearest(word, names)
    if "set" in names:
        if nearest(word, names, cutoff=0.8) is None and (elsewhere := known_elsewhere(key)):
            return f"{elsewhere}{'' if 'no key' in elsewhere else '; in the recipe, or as --set KEY=VALUE'}"
        if key == "config":
            return "recipes are named without a flag"
        if close is None and (places := [place for place in own_places(key) if "." in place]):
            return f"it is a key of the recipe: {' or '.join(f'--set {place}=VALUE' for place in places)}"
    return None if close is None else f"did you mean '--{close}'?"

"""argparse with a hint: the command, flag or value that was meant."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from wmtp.config.neighbours import NEIGHBOURS, known_elsewhere
from wmtp.spelling import did_you_mean

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """Ends a complaint of argparse with what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print usage and the message with its hint, and exit with 2."""
        super().error(self._with_hint(message))

    def _with_hint(self, message: str) -> str:
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message, re.DOTALL):
            # Python 3.14 writes the choices without quotes
            choices = [word.strip(" '") for word in choice[2].split(",")]
            hint = did_you_mean(choice[1], choices)
            return message if hint is None else f"{message[: choice.start(2) - 14]}; {hint}"
        if flag := re.search(r"unrecognized argument: (--?[^=\s]+)", message):
            hint = did_you_mean(flag[1], [name for name in self._option_string_actions if name.startswith("--")])
            key = flag[1].lstrip("-").replace("-", "_")
            if hint is None and key in NEIGHBOURS:
                hint = f"{known_elsewhere(key)}; in a config, or as --set KEY=VALUE"
            return message if hint is None else f"{message}; {hint}"
        return message

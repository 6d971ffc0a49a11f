"""Exceptions that WMTP raises on purpose.

The command line prints them without a traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from typing import ClassVar

__all__ = [
    "AuthenticationError",
    "ConfigError",
    "FileError",
    "InputError",
    "PlatformError",
    "PluginError",
    "Terminated",
    "WMTPError",
    "described",
]


class WMTPError(Exception):
    """Failure at run time.

    A full disk, a server that is away, an infinite loss.
    """

    exit_code: ClassVar[int] = 1  #: of the command line


class ConfigError(WMTPError):
    """Mistake in the user's input.

    The command line prints every problem on its own line.

    Args:
        problems: one line each, in the form ``file:line: dotted.key: what is wrong; what to do`` (file and line where known).
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def under(self, key: str) -> ConfigError:
        """Return the same problems, each with ``key`` in front."""
        return self.reworded(f"{key}: {problem}" for problem in self.problems)

    def reworded(self, problems: Iterable[str]) -> ConfigError:
        """Return the same error in other words."""
        error = ConfigError(list(problems))
        vars(error).update({name: value for name, value in vars(self).items() if name != "problems"})
        return error


class FileError(WMTPError):
    """Missing or damaged file, or one of another format.

    It was given, or belongs to a run or model that was given.
    """

    exit_code: ClassVar[int] = 2


class InputError(WMTPError):
    """Input that a component cannot read.

    What the user wrote is wrong, or the file.

    Args:
        key: the component's key that the message is about: ``uri``, ``split``.
        problem: what is wrong; what to do.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, key: str, problem: str) -> None:
        self.key = key
        super().__init__(problem)


class PluginError(WMTPError):
    """Breach of a plugin's contract.

    The message names the distribution and its version.
    """


class AuthenticationError(WMTPError):
    """Refusal by a launch service: user unknown, or not permitted.

    Raised by launchers.
    """

    exit_code: ClassVar[int] = 3


class PlatformError(WMTPError):
    """Failure of a launch service, or no answer from it.

    Raised by launchers.
    """

    exit_code: ClassVar[int] = 4


def described(error: BaseException) -> str:
    """Describe an unexpected error in one line.

    Without a message, by its place in the code.
    """
    if text := " ".join(str(error).split()):
        return f"{type(error).__name__}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return f"{type(error).__name__} without a message"
    last = frames[-1]
    return f"{type(error).__name__} without a message at {last.filename}:{last.lineno}, in {last.name}: {last.line}"


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the work."""

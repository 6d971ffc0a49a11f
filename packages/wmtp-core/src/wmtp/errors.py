"""The three exceptions that WMTP raises on purpose. The command line prints them as one clear line, without a traceback."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ConfigError", "PluginError", "WMTPError"]


class WMTPError(Exception):
    """The work failed: a file is damaged, a disk is full, a loss became infinite. The command line exits with 1."""


class ConfigError(WMTPError):
    """What the user wrote is wrong. The command line prints every problem on a line of its own and exits with 2.

    Args:
        problems: one line each, in the form ``file:line: dotted.key: what is wrong; what to do`` (file and line where known).
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class PluginError(WMTPError):
    """A plugin breaks its contract. The message names the distribution and its version. The command line exits with 1."""

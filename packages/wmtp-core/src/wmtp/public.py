"""Public functions: what all of them have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from wmtp.arguments import checks_arguments
from wmtp.plugins.failures import names_plugins

__all__ = ["public"]

P = ParamSpec("P")
R = TypeVar("R")


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse wrong arguments, and name the plugin that raised.

    See `wmtp.arguments.checks_arguments` and `wmtp.plugins.failures.names_plugins`.
    """
    return names_plugins(checks_arguments(function))

"""Consent to run code that a model wrote.

Only the user can give it, for one process; no config can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from wmtp.errors import ConfigError

__all__ = ["allow_code_execution", "code_execution_allowed", "require_consent"]

_allowed: ContextVar[bool] = ContextVar("wmtp_code_execution", default=False)


@contextmanager
def allow_code_execution(allowed: bool) -> Iterator[None]:
    """Set whether code that a model wrote may run within the block."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def code_execution_allowed() -> bool:
    """Return the value that `allow_code_execution` set."""
    return _allowed.get()


def require_consent(evaluators: Iterable[Any], allowed: bool) -> None:
    """Refuse before any work is done what would be refused after it.

    Raises:
        ConfigError: an evaluator runs code that the model wrote (its config class says ``executes_code = True``), and the user
            has not allowed it.
    """
    problems = [
        f"eval.{number}: '{evaluator.type}' runs code that the model writes, in a sandbox; say --allow-code-execution on the "
        "command line if that is what you want"
        for number, evaluator in enumerate(evaluators)
        if evaluator.executes_code and not allowed
    ]
    if problems:
        raise ConfigError(problems)

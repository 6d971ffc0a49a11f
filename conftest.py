"""Settings and fixtures of the whole test suite."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from preloaded import Server

# Tests run in one process a core, and most of what they compute is tiny: more threads would be in each other's way.
# Set here because torch reads it when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Server]:
    """Starts processes that have imported torch already: `run` and `start` of ``tests/preloaded.py``."""
    from preloaded import Server

    server = Server()
    yield server
    server.close()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Forget how a command of this process logged: its stream is closed, and errors of it get into other tests' output."""
    logger = logging.getLogger("wmtp")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out."""
    if config.option.markexpr == "not slow":
        terminalreporter.write_line("tests marked slow were left out; `just slow` (uv run pytest -m slow) runs them")

"""Settings and fixtures of the whole test suite."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import random
import signal
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from preloaded import Server

# Tests run in one process a core, and most of what they compute is tiny: more threads would be in each other's way.
# Set here because torch reads it when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Containers often forbid .pyc files: each process would rewrite the asserts of 350 files, and compile wmtp, anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell's `&` and some CI runners have Ctrl-C ignored, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, however long one takes: a test that fails says something about the change, not about chance or a
# busy machine. `--hypothesis-profile default` draws others.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the collector of cycles off libraries and collected tests: half a million objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # for libraries that count what is left


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Server]:
    """Starts processes that have imported torch already: `run` and `start` of ``tests/preloaded.py``."""
    from preloaded import Server

    server = Server()
    yield server
    server.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin each test with the same random numbers, whatever ran before it; with others by ``WMTP_TEST_SEED=1``."""
    seed = int(os.environ.get("WMTP_TEST_SEED", "0"))
    random.seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(seed)
    if torch := sys.modules.get("torch"):
        # torch.manual_seed notes for a GPU that nobody uses yet where it was called, which takes half a millisecond
        (torch if torch.cuda.is_initialized() else torch.default_generator).manual_seed(seed)


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

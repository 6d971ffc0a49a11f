"""A tracker that starts while the model loads: what fails is said before the first step, and a failed run is told."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from wmtp.errors import WMTPError
from wmtp.tracking import starting as starting_module
from wmtp.tracking.base import RunInfo, Tracker
from wmtp.tracking.starting import starting_beside

RUN = RunInfo(name="a", run_dir=Path("a"), tags={}, params={})


class Noted(Tracker):
    """Keeps what it was told, and waits for a signal to start."""

    starts_in_thread = True

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[Any] = []
        self.may_start = threading.Event()
        self._error = error

    def start(self, run: RunInfo) -> None:
        assert self.may_start.wait(300)
        if self._error is not None:
            raise self._error
        self.told.append("start")

    def log(self, step: int, metrics: Any) -> None:
        raise AssertionError

    def finish(self, status: str, model: Path | None) -> None:
        self.told.append((status, model))


def test_the_run_goes_on_while_the_tracker_starts() -> None:
    tracker = Noted()
    with starting_beside(tracker, RUN) as starting:
        assert tracker.told == []
        tracker.may_start.set()  # deadlocks if the start were waited for before
        starting.wait()
        assert tracker.told == ["start"]
    assert tracker.told == ["start"]


def test_what_fails_in_the_thread_is_raised_where_the_run_waits() -> None:
    tracker = Noted(WMTPError("no server"))
    tracker.may_start.set()
    with pytest.raises(WMTPError, match="no server"), starting_beside(tracker, RUN) as starting:
        starting.wait()
    assert tracker.told == []


def test_a_run_that_fails_meanwhile_is_a_failed_one() -> None:
    tracker = Noted()
    tracker.may_start.set()
    with pytest.raises(ValueError, match="the model"), starting_beside(tracker, RUN):
        raise ValueError("the model")
    assert tracker.told == ["start", ("failed", None)]


@pytest.mark.parametrize("in_thread", [True, False])
def test_one_that_does_not_start_is_named(in_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting_module, "_SAID_AFTER", 0.05)
    tracker, said = Noted(), f"waiting for the tracker {__name__}.Noted to start; Ctrl-C ends the run"
    tracker.starts_in_thread = in_thread  # type: ignore[misc]

    class Release(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == said:
                tracker.may_start.set()

    handler = Release()
    logging.getLogger("wmtp").addHandler(handler)
    try:
        with starting_beside(tracker, RUN) as starting:
            starting.wait()  # never ends, unless that is said
    finally:
        logging.getLogger("wmtp").removeHandler(handler)
    assert tracker.told == ["start"]


def test_a_tracker_that_has_not_said_so_starts_in_the_same_thread_at_the_end() -> None:
    tracker = Noted()
    tracker.starts_in_thread = False  # type: ignore[misc]
    with starting_beside(tracker, RUN) as starting:
        assert tracker.told == []
        tracker.may_start.set()
        starting.wait()
    with pytest.raises(ValueError), starting_beside(tracker, RUN):
        raise ValueError
    assert tracker.told == ["start"], "it was never started the second time"

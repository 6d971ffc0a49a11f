"""The end of a tracker: one that hangs holds no run, and is named."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
from tiny_recipe import tiny_recipe

import wmtp
from wmtp.tracking import Tracker, ending
from wmtp.tracking.ending import within
from wmtp.tracking.jsonl import Jsonl
from wmtp.tracking.several import Several

STUCK = f"the tracker {__name__}.Stuck"


class Stuck(Tracker):
    """Ends when it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.called: list[str] = []

    def start(self, run: Any) -> None: ...

    def log(self, step: int, metrics: Any) -> None: ...

    def log_artifact(self, file: Path) -> None:
        self.called.append(file.name)

    def finish(self, status: str, model: Path | None) -> None:
        self.called.append(status)
        assert self.let_go.wait(300)

    def location(self) -> str:
        raise AssertionError("it may hang here too")


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ending, "_SAID_AFTER", 0.05)
    monkeypatch.setattr(ending, "_PATIENCE", 0.2)
    tracker = Stuck()
    yield tracker
    tracker.let_go.set()


def test_one_that_hangs_is_left_behind_and_not_asked_again(stuck, caplog):
    assert not within(stuck, lambda: stuck.finish("finished", None))
    assert not within(stuck, lambda: stuck.log_artifact(Path("report.html")))
    assert stuck.called == ["finished"]
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for {STUCK}, for 0.2 s at most; Ctrl-C ends the wait",
        f"{STUCK} has not finished in 0.2 s and is left behind; metrics.jsonl has everything",
    ]


def test_what_it_raises_is_raised_where_the_run_waits(stuck):
    with pytest.raises(ZeroDivisionError):
        within(stuck, lambda: 1 // 0)
    stuck.let_go.set()
    assert within(stuck, lambda: stuck.finish("finished", None))


def test_one_that_ends_by_itself_is_waited_for_in_the_runs_own_thread(stuck):
    threads: list[int] = []
    for tracker in (stuck, Several({})):
        within(tracker, lambda: threads.append(threading.get_ident()))
    assert threads[0] != threading.get_ident() == threads[1]


def test_among_several_it_is_the_only_one_left_behind(stuck, caplog, tmp_path):
    class Told(Jsonl):
        told = ""

        def finish(self, status: str, model: Path | None) -> None:
            self.told = status

    other = Told()
    assert within(several := Several({"stuck": stuck, "other": other}), lambda: several.finish("stopped", None))
    assert other.told == "stopped"
    assert f"{STUCK} has not finished" in caplog.text


@attrs.frozen(kw_only=True)
class Given(wmtp.TrackerConfig):
    type = "given"

    def build(self) -> Tracker:
        raise NotImplementedError


def test_a_run_ends_without_a_tracker_that_hangs(stuck, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(Given, "build", lambda self: stuck)
    (tmp_path / "code.jsonl").write_text('{"text": "a = 1"}\n' * 4)
    recipe = tiny_recipe(str(tmp_path / "code.jsonl"), run={"output_dir": str(tmp_path / "runs")})
    result = wmtp.run(attrs.evolve(wmtp.load_config(recipe), tracker=Given()))
    assert result.status == "finished"
    assert stuck.called == ["report.html", "finished"]
    assert f"{STUCK} has not finished in 0.2 s and is left behind" in caplog.text

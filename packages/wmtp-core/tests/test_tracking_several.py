"""Several trackers at once: each is told everything, whatever happens to the others."""

import json
import logging
import threading
from importlib.util import find_spec

import attrs
import pytest
from tiny_recipe import SHORTEST_TOML

import wmtp
from wmtp.cli import main
from wmtp.testing import TrackerTests
from wmtp.tracking import RunInfo, Tracker
from wmtp.tracking.config import JsonlTracker, MLflowTracker, SeveralTrackers, TensorBoardTracker
from wmtp.tracking.jsonl import Jsonl
from wmtp.tracking.several import Several

# not imported before a test needs it: that takes seconds
pytestmark = pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")


class Notes(Tracker):
    def __init__(self, fails=()):
        self.heard = []
        self.fails = fails

    def _hear(self, what):
        self.heard.append(what)
        if what in self.fails:
            raise RuntimeError("no")

    def start(self, run):
        self._hear("start")

    def log(self, step, metrics):
        self._hear("log")
        metrics["loss"] = 0.0

    def finish(self, status, model):
        self._hear(f"finish {status}")


@attrs.frozen(kw_only=True)
class NotesTracker(wmtp.TrackerConfig):
    type = "notes"
    into: list = attrs.field(factory=list)
    fails: tuple[str, ...] = ()

    def build(self):
        self.into.append(Notes(self.fails))
        return self.into[-1]


class TestSeveralTrackers(TrackerTests):
    config = SeveralTrackers(of=(JsonlTracker(), TensorBoardTracker()))


def test_those_that_have_started_are_closed_whatever_one_of_them_does(tmp_path):
    bad, good, unusable = Notes(fails=("finish failed",)), Notes(), Notes(fails=("start",))
    tracker = Several({"bad": bad, "good": good, "unusable": unusable})
    with pytest.raises(RuntimeError, match="no") as raised:
        tracker.start(RunInfo(name="x", run_dir=tmp_path, tags={}, params={}))
    assert raised.traceback[-2].name == "start"  # of the tracker that cannot be used, not of closing another
    assert [one.heard for one in (bad, good, unusable)] == [["start", "finish failed"], ["start", "finish failed"], ["start"]]


def test_ctrl_c_in_the_end_of_one_leaves_no_other_open(monkeypatch):
    """Another hangs, too: after Ctrl-C it has no ten minutes."""

    class Left(Jsonl):
        ends_by_itself = True

        def finish(self, status, model):
            raise KeyboardInterrupt

    class Hangs(Jsonl):
        ends_by_itself = True

        def finish(self, status, model):
            released.wait(60)

    released, notes = threading.Event(), Notes()
    monkeypatch.setattr("wmtp.tracking.several.AFTER_CTRL_C", 0.05)
    with pytest.raises(KeyboardInterrupt):
        Several({"left": Left(), "hangs": Hangs(), "notes": notes}).finish("finished", None)
    assert notes.heard == ["finish finished"]
    released.set()


def test_one_that_fails_is_said_once_and_the_others_are_told(tmp_path, caplog):
    bad, good = NotesTracker(fails=("log", "finish finished")), NotesTracker()
    several = SeveralTrackers(of=(bad, JsonlTracker(), good))
    tracker = several.build()
    # of one type each in a config; here two of a kind tell apart what each hears
    tracker = type(tracker)({"bad": bad.build(), "jsonl": JsonlTracker().build(), "good": good.build()})
    tracker.start(RunInfo(name="x", run_dir=tmp_path, tags={}, params={}))
    metrics = {"loss": 1.0}
    with caplog.at_level(logging.WARNING, "wmtp"):
        tracker.log(1, metrics)
        tracker.log(2, metrics)
        tracker.finish("finished", None)
    assert good.into[-1].heard == ["start", "log", "log", "finish finished"]
    assert [record.message for record in caplog.records] == [
        f"the tracker bad failed: {__name__}: Notes.log raised RuntimeError: no ({__file__}:32); metrics.jsonl has everything"
    ]
    assert metrics == {"loss": 1.0}
    assert tracker.location() == str(tmp_path / "metrics.jsonl")


def test_those_before_one_that_cannot_start_are_closed(tmp_path):
    good, bad = NotesTracker().build(), NotesTracker(fails=("start",)).build()
    tracker = type(SeveralTrackers(of=(NotesTracker(), JsonlTracker())).build())({"good": good, "bad": bad})
    with pytest.raises(RuntimeError):
        tracker.start(RunInfo(name="x", run_dir=tmp_path, tags={}, params={}))
    assert good.heard == ["start", "finish failed"]


def test_in_toml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = SHORTEST_TOML + '[tracker]\ntype = "several"\n[[tracker.of]]\ntype = "mlflow"\n'
    (tmp_path / "a.toml").write_text(text + '[[tracker.of]]\ntype = "jsonl"\n')
    assert wmtp.load_config("a.toml").tracker == SeveralTrackers(of=(MLflowTracker(), JsonlTracker()))
    (tmp_path / "b.toml").write_text(text + 'tracking_uri = "s3://"\n[[tracker.of]]\ntype = "mlflow"\n')
    assert main(["check", "b.toml", "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert "b.toml:14: tracker.of.0.tracking_uri: 's3://' names no bucket; write s3://BUCKET/PATH" in problems
    assert any("tracker.of: 'mlflow' is there 2 times; keep one" in problem for problem in problems)

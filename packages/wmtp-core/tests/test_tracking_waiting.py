"""Tracker that hangs while a run trains: it is named, once a step, by a thread that ends with the steps."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import pytest
from tiny_recipe import tiny_recipe

import wmtp
from wmtp.tracking import Tracker, waiting
from wmtp.tracking.jsonl import Jsonl
from wmtp.tracking.several import Several
from wmtp.training.stages import StageBatches


class Stuck(Jsonl):
    """Hangs in its second step until the log has named it."""

    def __init__(self) -> None:
        self.named, self.steps = threading.Event(), []

    def log(self, step: int, metrics: Any) -> None:
        self.steps.append(step)
        assert step != 2 or self.named.wait(60)


@attrs.frozen(kw_only=True)
class Given(wmtp.TrackerConfig):
    type = "given"

    def build(self) -> Tracker:
        raise NotImplementedError


@pytest.mark.parametrize("among_several", [False, True])
def test_it_is_named_and_training_goes_on(among_several: bool, caplog, tmp_path: Path, monkeypatch) -> None:
    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for" in record.getMessage():
                stuck.named.set()

    stuck = Stuck()
    monkeypatch.setattr(waiting, "_SAID_AFTER", 0.2)
    monkeypatch.setattr(Given, "build", lambda self: Several({"a": Jsonl(), "b": stuck}) if among_several else stuck)
    (tmp_path / "code.jsonl").write_text('{"text": "a = 1"}\n' * 4)
    recipe = tiny_recipe(str(tmp_path / "code.jsonl"), run={"output_dir": str(tmp_path / "runs")})
    handler = Heard()
    logging.getLogger("wmtp").addHandler(handler)
    try:
        result = wmtp.run(attrs.evolve(wmtp.load_config(recipe, overrides=["train.max_steps=3"]), tracker=Given()))
    finally:
        logging.getLogger("wmtp").removeHandler(handler)
    assert (result.status, result.steps) == ("finished", 3)
    assert stuck.steps[:3] == [1, 2, 3]
    (said,) = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
    assert said.startswith(f"step 2: waiting for the tracker {__name__}.Stuck since 0.")


@pytest.mark.parametrize("fails", [False, True])
def test_the_watch_ends_with_the_steps(fails: bool, tmp_path: Path, monkeypatch) -> None:
    """Also where they cannot begin: a study's process goes on with other runs."""

    def refuse(self: StageBatches, *, pin: bool) -> None:
        raise OSError("no more threads")

    if fails:
        monkeypatch.setattr(StageBatches, "open", refuse)
    (tmp_path / "code.jsonl").write_text('{"text": "a = 1"}\n' * 4)
    recipe = tiny_recipe(str(tmp_path / "code.jsonl"), run={"output_dir": str(tmp_path / "runs")})
    with pytest.raises(OSError, match="no more threads") if fails else nullcontext():
        wmtp.run(recipe, overrides=["train.max_steps=2"])
    deadline = time.monotonic() + 10
    while (left := [t for t in threading.enumerate() if t.name == "wmtp-tracker-watch"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left

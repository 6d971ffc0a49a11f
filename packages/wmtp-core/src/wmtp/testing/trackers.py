"""Suite for trackers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
from attrs import evolve

from wmtp.testing.component import ComponentTests
from wmtp.tracking import RunInfo, Tracker

__all__ = ["TrackerTests"]


class TrackerTests(ComponentTests):
    """Contract tests of a tracker.

    Delivery to the service is for the plugin's own tests.
    """

    __test__ = False
    kind = "trackers"

    @pytest.fixture
    def run(self, tmp_path: Path) -> RunInfo:
        """A new run."""
        run_dir = tmp_path / "runs" / "a run"
        run_dir.mkdir(parents=True)
        (run_dir / "config.toml").write_text("")
        (run_dir / "run.json").write_text("{}")
        return RunInfo(name="a run", run_dir=run_dir, tags={"kind": "test"}, params={"optimizer.lr": "0.001", "empty": ""})

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        """A model folder."""
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        return tmp_path / "model"

    def steps(self, run: RunInfo, metric: str) -> list[int] | None:
        """Read back a metric's steps, each as often as it is there.

        None, the default, where a test cannot know it. `test_resume` needs it to see that no step is there twice.
        """
        return None

    def test_a_whole_run(self, run: RunInfo, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """A whole run is tracked, and standard output stays empty.

        ``location`` is one line. Standard output belongs to ``--json``.
        """
        tracker = self.config.build()
        assert isinstance(tracker, Tracker)
        tracker.start(run)
        for step in range(1, 30):
            tracker.log(step, {"loss": 1 / step, "loss/head_1": 1 / step, "weight/mean": 1.0})
        report = run.run_dir / "report.html"
        report.write_text("<!doctype html>")
        tracker.log_artifact(report)
        tracker.finish("finished", model)
        assert report.read_text() == "<!doctype html>"
        location = tracker.location()
        assert location is None or (location.strip() and "\n" not in location)
        assert capfd.readouterr().out == ""

    def test_numbers_that_are_none(self, run: RunInfo) -> None:
        """NaN and infinity do not stop training."""
        tracker = self.config.build()
        tracker.start(run)
        tracker.log(1, {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "huge": 1e308, "int": 3})
        tracker.log(2, {})
        tracker.finish("finished", None)

    def test_odd_names(self, run: RunInfo) -> None:
        """A metric may have the name of somebody's data set."""
        tracker = self.config.build()
        tracker.start(run)
        tracker.log(1, {"eval/my data@v2/loss": 1.0, "ü": 1.0, "//": 1.0, "..": 1.0, "": 1.0, "long" * 200: 1.0})
        tracker.finish("finished", None)

    @pytest.mark.parametrize("status", ["finished", "stopped", "interrupted", "failed"])
    def test_every_end(self, run: RunInfo, status: Literal["finished", "stopped", "interrupted", "failed"]) -> None:
        """A run may end in any way, also before its first step.

        Ending twice does no harm.
        """
        tracker = self.config.build()
        tracker.start(run)
        tracker.finish(status, None)
        tracker.finish(status, None)

    def test_resume(self, run: RunInfo, model: Path) -> None:
        """A later process continues the run, with a changed config.

        Steps 4 and 5 come twice, and must be there once.
        """
        first = self.config.build()
        first.start(run)
        for step in range(1, 6):
            first.log(step, {"loss": 1.0})
        first.finish("interrupted", None)
        again = self.config.build()
        changed = {"optimizer.lr": "0.01", "new": "1"}
        again.start(evolve(run, resumed_step=3, params=changed, logged={"loss": 5}))
        for step in range(4, 9):
            again.log(step, {"loss": 1.0})
        again.finish("finished", model)
        found = self.steps(run, "loss")
        assert found is None or sorted(found) == list(range(1, 9))

    def test_resume_before_the_first_checkpoint(self, run: RunInfo) -> None:
        """A run that was killed before its first checkpoint begins again.

        Every step comes again, and is there once.
        """
        first = self.config.build()
        first.start(run)
        for step in range(1, 4):
            first.log(step, {"loss": 1.0})
        first.finish("failed", None)
        again = self.config.build()
        again.start(evolve(run, logged={"loss": 3}))
        for step in range(1, 6):
            again.log(step, {"loss": 1.0})
        again.finish("finished", None)
        found = self.steps(run, "loss")
        assert found is None or sorted(found) == list(range(1, 6))

    def test_metrics_are_not_changed(self, run: RunInfo) -> None:
        """A tracker does not change the metrics that it is given."""
        tracker = self.config.build()
        tracker.start(run)
        metrics = {"loss": 1.0, "a b": 2.0}
        tracker.log(1, metrics)
        tracker.finish("finished", None)
        assert metrics == {"loss": 1.0, "a b": 2.0}

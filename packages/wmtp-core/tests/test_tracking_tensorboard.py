"""TensorBoard reads back what the tracker wrote, by its own reader."""

from importlib.util import find_spec

import pytest

from wmtp.errors import WMTPError
from wmtp.testing import TrackerTests
from wmtp.tracking import RunInfo
from wmtp.tracking.config import TensorBoardTracker

# not imported before a test needs it: that takes seconds
pytestmark = pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """TensorBoard reads files in the order of their names, and within a second .10 comes before .9; runs take longer."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


def scalars(folder, metric):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(point.step, point.value) for point in EventAccumulator(str(folder)).Reload().Scalars(metric)]


class TestTensorBoardTracker(TrackerTests):
    config = TensorBoardTracker()

    def steps(self, run, metric):
        return [step for step, _ in scalars(run.run_dir.parent / "tensorboard" / run.name, metric)]


def test_a_folder_of_its_own_and_the_newer_value_of_a_step_that_is_done_again(tmp_path):
    def info(step):
        return RunInfo(name="x", run_dir=tmp_path / "runs/x", tags={}, params={"optimizer.lr": "1"}, resumed_step=step)

    for resumed, steps, value in ((None, (1, 2, 3), 1.0), (2, (3, 4), 5.0)):
        tracker = TensorBoardTracker(folder=str(tmp_path / "t b")).build()
        assert tracker.location() is None
        tracker.start(info(resumed))
        for step in steps:
            tracker.log(step, {"loss": value})
        tracker.finish("finished", None)
    assert scalars(tmp_path / "t b" / "x", "loss") == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]
    assert tracker.location() == f"tensorboard --logdir '{tmp_path}/t b'"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    tracker = TensorBoardTracker(folder=str(tmp_path / "file")).build()
    with pytest.raises(WMTPError, match=r"tracker.folder: .*/file cannot be written: Not a directory"):
        tracker.start(RunInfo(name="x", run_dir=tmp_path, tags={}, params={}))

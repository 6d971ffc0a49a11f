import subprocess
import sys

from wmtp.tracking import RunInfo
from wmtp.tracking.config import JsonlTracker


def test_it_names_the_file_and_leaves_nothing(tmp_path):
    tracker = JsonlTracker().build()
    assert tracker.location() is None
    tracker.start(RunInfo(name="n", run_dir=tmp_path, tags={}, params={}))
    tracker.log(1, {"loss": 1.0})
    tracker.finish("finished", None)
    assert tracker.location() == str(tmp_path / "metrics.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_config_classes_import_neither_mlflow_nor_torch():
    code = "import sys, wmtp.tracking.config as c; c.JsonlTracker().build(); print({'mlflow', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

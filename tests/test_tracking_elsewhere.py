"""MLflow runs in an object store: tracked on several machines, merged into one database, seen as MLflow shows them."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import environment
from small_server import free_port

from wmtp_storage import S3Storage
from wmtp_storage.testing import s3_server

__all__ = ["s3_server"]

pytestmark = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow")


@pytest.fixture
def place(s3_server, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return f"s3://{s3_server.bucket()}/team/mlruns"


def client_of(uri):
    from mlflow import MlflowClient  # takes seconds

    return MlflowClient(uri)


def client(database):
    return client_of(f"sqlite:///{database}")


def run_id(run_dir):
    return json.loads((run_dir / "mlflow.json").read_text())["run_id"]


def view(found, run):
    """All that MLflow tells of a run, but where its files are."""
    whole = found.get_run(run)
    histories = {
        name: [(point.step, point.timestamp, point.value) for point in found.get_metric_history(run, name)]
        for name in whole.data.metrics
    }
    files = {}
    folders = [""]
    while folders:
        for file in found.list_artifacts(run, folders.pop()):
            if file.is_dir:
                folders.append(file.path)
            else:
                files[file.path] = Path(found.download_artifacts(run, file.path)).read_bytes()
    info = whole.info
    facts = (info.run_id, info.run_name, info.status, info.start_time, info.end_time, info.lifecycle_stage, info.user_id)
    experiment = found.get_experiment(info.experiment_id).name
    return facts, experiment, whole.data.params, whole.data.tags, histories, files


@pytest.mark.slow
def test_runs_of_several_machines_are_merged_and_survive_exactly(recipe, wmtp, place, tmp_path):
    """One goes on on another machine; a third of another experiment comes later; pulling twice changes nothing."""
    words = [
        "run",
        recipe,
        "--set",
        "tracker={type = 'mlflow', log_artifacts = true}",
        "--set",
        f"tracker.tracking_uri={place}",
    ]
    words += ["--set", f"checkpoints.uri={place}-checkpoints", "--set", "train.eval_interval=5"]
    first = wmtp(
        *words, "--run-name", "one", "--set", f"run.output_dir={tmp_path}/a", "--set", "train.max_steps=10", cwd=tmp_path
    )
    assert first.returncode == 0, first.stderr
    assert f"wmtp runs pull {place}" in first.stderr
    pulled = wmtp("runs", "pull", place, "--into", tmp_path / "all" / "mlflow.db", "--json", cwd=tmp_path)
    assert pulled.returncode == 0, pulled.stderr
    one = run_id(tmp_path / "a" / "one")
    assert json.loads(pulled.stdout)["new"] == [one]
    ours, whole = client(tmp_path / "all" / "mlflow.db"), view(client(tmp_path / "a/one/tracking/mlflow.db"), one)
    assert view(ours, one) == whole
    assert [step for step, _, _ in whole[4]["loss"]] == list(range(1, 11))
    assert "config.toml" in whole[5]
    assert any(name.endswith("model.safetensors") for name in whole[5])

    # what a tracker on another machine has is its URI and the files of the run
    resumed = tmp_path / "b" / "one"
    resumed.mkdir(parents=True)
    for name in ("config.toml", "run.json", "metrics.jsonl", "mlflow.json"):
        (resumed / name).write_bytes((tmp_path / "a" / "one" / name).read_bytes())
    from wmtp.tracking import RunInfo
    from wmtp.tracking.config import MLflowTracker

    tracker = MLflowTracker(tracking_uri=place).build()
    backends = {"s3": S3Storage().build()}
    tracker.start(RunInfo(name="one", run_dir=resumed, tags={}, params={}, resumed_step=10, backends=backends))
    tracker.log(11, {"loss": 0.5})
    tracker.saved(11)
    tracker.finish("finished", None)
    other = MLflowTracker(tracking_uri=place, experiment="another").build()
    (tmp_path / "c" / "two").mkdir(parents=True)
    (tmp_path / "c" / "two" / "config.toml").write_text("")
    other.start(RunInfo(name="two", run_dir=tmp_path / "c" / "two", tags={"a": "b"}, params={"x": "1"}, backends=backends))
    other.log(1, {"loss": 3.0, "ünï code/1": 1.0})
    other.finish("failed", None)

    two = run_id(tmp_path / "c" / "two")
    again = wmtp("runs", "pull", place, "--into", tmp_path / "all" / "mlflow.db", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["new"] == [two]
    assert json.loads(again.stdout)["changed"] == [one]
    ours = client(tmp_path / "all" / "mlflow.db")
    assert view(ours, one)[4]["loss"][:10] == whole[4]["loss"]
    assert view(ours, one)[4]["loss"][10][::2] == (11, 0.5)
    assert view(ours, one)[5] == whole[5]
    assert view(ours, two) == view(client(tmp_path / "c/two/tracking/mlflow.db"), two)
    before = {run: view(ours, run) for run in (one, two)}
    third = wmtp("runs", "pull", place, "--into", tmp_path / "all" / "mlflow.db", cwd=tmp_path)
    assert "0 new runs, 0 updated, 2 unchanged" in third.stdout
    (tmp_path / "all" / ".mlflow.db.pulled.json").unlink()
    forced = wmtp("runs", "pull", place, "--into", tmp_path / "all" / "mlflow.db", "--json", cwd=tmp_path)
    assert sorted(json.loads(forced.stdout)["changed"]) == sorted([one, two])
    assert {run: view(client(tmp_path / "all" / "mlflow.db"), run) for run in (one, two)} == before
    with _server(tmp_path / "all" / "mlflow.db", tmp_path) as address:
        assert {run: view(client_of(address), run) for run in (one, two)} == before


class _server:
    """A real MLflow server over a database."""

    def __init__(self, database, folder):
        self.port = free_port()
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port)],
            cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1)
                return f"http://127.0.0.1:{self.port}"
            except OSError:
                assert self.process.poll() is None
                time.sleep(0.2)
        raise AssertionError("the server did not start")

    def __exit__(self, *_):
        os.killpg(self.process.pid, 9)
        self.process.wait()


def test_what_is_wrong_is_said(recipe, wmtp, place, tmp_path):
    nothing = wmtp("runs", "pull", f"{place}/nothing", "--into", tmp_path / "m.db", cwd=tmp_path)
    assert nothing.returncode == 2
    assert "there are no runs" in nothing.stderr
    assert not (tmp_path / "m.db").exists()
    gone = place.replace("/team", "-gone/team")
    run = wmtp("run", recipe, "--set", f"tracker={{type = 'mlflow', tracking_uri = '{gone}'}}", "--run-name", "x", cwd=tmp_path)
    assert run.returncode == 1
    assert "no such bucket" in run.stderr
    assert "Traceback" not in run.stderr

import json
import logging
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_server import Answers, free_port, serving

from wmtp.errors import ConfigError, WMTPError
from wmtp.tracking import RunInfo
from wmtp.tracking.config import MLflowTracker

# not imported before a test needs it: that takes seconds
pytestmark = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow takes seconds to make one."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    client(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def run(tmp_path, empty_database):
    run_dir = tmp_path / "my runs" / "first"
    run_dir.mkdir(parents=True)
    shutil.copy(empty_database, run_dir.parent)
    (run_dir / "config.toml").write_text("x = 1\n")
    (run_dir / "run.json").write_text("{}\n")
    return RunInfo(name="first", run_dir=run_dir, tags={"git.commit": "abc"}, params={"optimizer.lr": "0.001", "empty": ""})


def resumed(run, step, **changes):
    return RunInfo(name=run.name, run_dir=run.run_dir, tags=run.tags, params={**run.params, **changes}, resumed_step=step)


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def default_uri(run):
    return f"sqlite:///{run.run_dir.parent}/mlflow.db"


def run_id(run):
    return json.loads((run.run_dir / "mlflow.json").read_text())["run_id"]


def stored(uri, run):
    return client(uri).get_run(run_id(run))


def history(uri, run, key):
    return [
        (point.step, point.value) for point in sorted(client(uri).get_metric_history(run_id(run), key), key=lambda p: p.step)
    ]


def test_a_whole_run_in_the_default_sqlite_file(run, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("w")
    tracker = MLflowTracker(log_artifacts=True).build()
    assert tracker.location() is None
    tracker.start(run)
    for step in range(1, 50):
        tracker.log(step, {"loss": 1 / step, "loss/head_1": step, "lr@weird//name": 1.0})
    tracker.log(50, {"nan": math.nan, "inf": math.inf})
    (run.run_dir / "report.html").write_text("page")
    tracker.log_artifact(run.run_dir / "report.html")
    tracker.finish("finished", model)
    tracker.finish("finished", model)

    uri = default_uri(run)
    found = stored(uri, run)
    assert found.info.run_name == "first"
    assert found.info.status == "FINISHED"
    assert found.data.params == run.params
    assert found.data.tags.items() >= {"git.commit": "abc", "wmtp.status": "finished", "wmtp.model": str(model)}.items()
    assert history(uri, run, "loss") == [(step, 1 / step) for step in range(1, 50)]
    assert history(uri, run, "loss/head_1")[-1] == (49, 49.0)
    assert history(uri, run, "_lr_weird__name")[-1] == (49, 1.0)
    assert math.isnan(found.data.metrics["nan"])
    assert found.data.metrics["inf"] == sys.float_info.max
    artifacts = run.run_dir.parent / "mlflow-artifacts" / run_id(run) / "artifacts"
    assert sorted(p.relative_to(artifacts).as_posix() for p in artifacts.rglob("*") if p.is_file()) == [
        "config.toml",
        "model/weights",
        "report.html",
        "run.json",
    ]
    location = tracker.location()
    assert location is not None
    assert location.endswith(f"mlflow ui --backend-store-uri '{uri}'")


@pytest.mark.parametrize(("status", "theirs"), [("stopped", "FINISHED"), ("interrupted", "KILLED"), ("failed", "FAILED")])
def test_how_a_run_ended(run, status, theirs):
    tracker = MLflowTracker().build()
    tracker.start(run)
    tracker.finish(status, None)
    assert stored(default_uri(run), run).info.status == theirs
    assert stored(default_uri(run), run).data.tags["wmtp.status"] == status


def test_a_resume_goes_on_in_the_same_run_with_one_point_a_step(run):
    uri = default_uri(run)
    killed = MLflowTracker().build()
    killed.start(run)
    for step in range(1, 8):
        killed.log(step, {"loss": float(step)})
    killed.log(5, {"eval/loss": 5.0})
    assert killed._sender.close(300) == 0  # all that a kill leaves is what was sent

    again = MLflowTracker().build()
    again.start(resumed(run, 5, **{"optimizer.lr": "0.1", "new": "1"}))
    assert stored(uri, run).info.status == "RUNNING"
    for step in range(6, 11):
        again.log(step, {"loss": float(step), "eval/loss": float(step)})
    again.finish("finished", None)

    assert len(client(uri).search_runs([stored(uri, run).info.experiment_id])) == 1
    assert history(uri, run, "loss") == [(step, float(step)) for step in range(1, 11)]
    assert history(uri, run, "eval/loss") == [(step, float(step)) for step in range(5, 11)]
    data = stored(uri, run).data
    assert data.params == {**run.params, "new": "1"}
    assert data.tags["wmtp.changed.optimizer.lr"] == "0.1"
    assert data.tags["wmtp.resumed_step"] == "5"


def test_a_resume_from_before_the_first_checkpoint_is_the_same_run_too(run):
    killed = MLflowTracker().build()
    killed.start(run)
    killed.log(1, {"loss": 1.0})
    assert killed._sender.close(300) == 0
    again = MLflowTracker().build()
    again.start(run)
    for step in (1, 2):
        again.log(step, {"loss": float(step)})
    again.finish("finished", None)
    uri = default_uri(run)
    assert history(uri, run, "loss") == [(1, 1.0), (2, 2.0)]
    assert len(client(uri).search_runs([stored(uri, run).info.experiment_id])) == 1


def test_a_resume_sends_what_an_earlier_attempt_could_not(run):
    uri = default_uri(run)
    killed = MLflowTracker().build()
    killed.start(run)
    killed.log(1, {"loss": 1.0})
    assert killed._sender.close(300) == 0
    rows = "".join(json.dumps({"step": step, "loss": float(step), "stage": "train"}) + "\n" for step in range(1, 7))
    (run.run_dir / "metrics.jsonl").write_text(rows + '{"step": 7, "lo')

    again = MLflowTracker().build()
    again.start(resumed(run, 4))
    again.log(5, {"loss": 50.0})
    again.finish("finished", None)
    assert history(uri, run, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]


@pytest.mark.parametrize("how", ["deleted", "other database"])
def test_a_resume_whose_run_is_gone_makes_a_new_one(run, how, caplog, tmp_path, empty_database):
    first = MLflowTracker().build()
    first.start(run)
    first.finish("interrupted", None)
    before = run_id(run)
    uri = default_uri(run)
    if how == "deleted":
        client(uri).delete_run(before)
    else:
        uri = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'new.db')}"
    again = MLflowTracker(tracking_uri=uri).build()
    again.start(resumed(run, 3))
    again.finish("finished", None)
    assert run_id(run) != before
    assert stored(uri, run).info.status == "FINISHED"
    assert ("no longer has the run" in caplog.text) == (how == "deleted")


def test_a_damaged_state_file_is_named(run):
    (run.run_dir / "mlflow.json").write_text("{")
    with pytest.raises(WMTPError, match=r"mlflow\.json: cannot be read as JSON: .*; remove it"):
        MLflowTracker().build().start(resumed(run, 1))


def test_long_values_and_many_params(run):
    params = {f"k{number}": "v" for number in range(250)} | {"long": "x" * 9000}
    tracker = MLflowTracker().build()
    tracker.start(RunInfo(name="n", run_dir=run.run_dir, tags={"long": "y" * 9000}, params=params))
    tracker.finish("finished", None)
    data = stored(default_uri(run), run).data
    assert len(data.params) == 251
    assert data.params["long"] == "x" * 5999 + "…"
    assert data.tags["long"] == "y" * 4999 + "…"


def test_a_run_deleted_midway_does_not_stop_training(run, caplog):
    tracker = MLflowTracker().build()
    tracker.start(run)
    client(default_uri(run)).delete_run(run_id(run))
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.finish("finished", None)
    assert caplog.text.count("refuses metrics") == 1


def test_a_deleted_experiment_says_how_to_restore_it(run):
    tracker = MLflowTracker(experiment="gone").build()
    tracker.start(run)
    tracker.finish("finished", None)
    store = client(default_uri(run))
    store.delete_experiment(stored(default_uri(run), run).info.experiment_id)
    with pytest.raises(WMTPError, match="'gone' is deleted; restore it"):
        MLflowTracker(experiment="gone").build().start(run)


def test_a_file_that_is_no_database(run, tmp_path):
    (tmp_path / "x.db").write_text("this is a text, not a database " * 50)
    with pytest.raises(WMTPError, match="not a database"):
        MLflowTracker(tracking_uri=f"sqlite:///{tmp_path}/x.db").build().start(run)


SCRIPT = """if True:
    import sys
    from pathlib import Path
    from wmtp.tracking import RunInfo
    from wmtp.tracking.config import MLflowTracker
    run_dir = Path(sys.argv[1])
    run_dir.mkdir(parents=True)
    (run_dir / "config.toml").write_text("")
    tracker = MLflowTracker().build()
    tracker.start(RunInfo(name="n", run_dir=run_dir, tags={}, params={}))
    tracker.log(1, {"loss": 1.0})
    tracker.finish("finished", None)
"""


@pytest.mark.slow
def test_runs_that_start_at_once_share_one_experiment_and_say_nothing(tmp_path):
    """Two processes make one new database. Nothing is printed, and nothing is left in the working folder."""
    (tmp_path / "cwd").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "out" / name)],
            cwd=tmp_path / "cwd",
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("a", "b")
    ]
    for process in processes:
        assert process.communicate()[0] == ""
        assert process.returncode == 0
    assert list((tmp_path / "cwd").iterdir()) == []
    store = client(f"sqlite:///{tmp_path}/out/mlflow.db")
    experiment = store.get_experiment_by_name("wmtp")
    assert len(store.search_runs([experiment.experiment_id])) == 2


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("./mlruns", "write sqlite:///./mlruns/mlflow.db"),
        ("/data/mlruns/", "write sqlite:////data/mlruns/mlflow.db"),
        ("file:///data/mlruns", "write sqlite:////data/mlruns/mlflow.db"),
        ("sqlite://mlflow.db", "names no file; write sqlite:///"),
        ("sqlite:///", "names no file"),
        ("http://", "names no host"),
        ("http://host:port", "no URI"),
        ("https://ada:hunter2@host", "MLFLOW_TRACKING_PASSWORD"),
        ("ftp:x", "cannot track to ftp:"),
        ("", "is a path"),
    ],
)
def test_wrong_address(uri, says, run):
    config = MLflowTracker(tracking_uri=uri)
    (problem,) = config.check()
    assert problem.startswith("tracking_uri: ")
    assert says in problem
    assert "hunter2" not in problem
    with pytest.raises(ConfigError, match=r"tracker\.tracking_uri: "):
        config.build().start(run)


@pytest.mark.parametrize(
    "uri", [None, "sqlite:///m.db", "sqlite:////a/m.db", "http://localhost:5000", "postgresql+psycopg2://x/y"]
)
def test_good_address(uri):
    assert list(MLflowTracker(tracking_uri=uri).check()) == []


class Server:
    """A real ``mlflow server``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/m.db", "--artifacts-destination", str(self.folder / "a")]
        env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        log.close()
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.1)

    def kill(self):
        if self.process.returncode is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_database):
    server = Server(tmp_path_factory.mktemp("server"))
    shutil.copy(empty_database, server.folder / "m.db")
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back_loses_nothing(server, run, caplog):
    caplog.set_level(logging.INFO, "wmtp")
    tracker = MLflowTracker(tracking_uri=server.uri, log_artifacts=True).build()
    tracker.start(run)
    tracker.log(1, {"loss": 1.0, "nan": math.nan, "inf": math.inf})
    while "loss" not in stored(server.uri, run).data.metrics:
        time.sleep(0.1)

    server.kill()
    for step in range(2, 3000):
        tracker.log(step, {"loss": float(step), "acc": 0.5})  # returns with nobody there
    while "is away" not in caplog.text:
        time.sleep(0.05)
    server.start()
    tracker.log(3000, {"loss": 3000.0})
    tracker.finish("finished", None)

    assert history(server.uri, run, "loss") == [(step, float(step)) for step in range(1, 3001)]
    found = stored(server.uri, run)
    assert found.info.status == "FINISHED"
    assert math.isnan(found.data.metrics["nan"])
    assert found.data.metrics["inf"] > 1e300
    assert found.data.params == run.params
    assert [file.path for file in client(server.uri).list_artifacts(run_id(run))] == ["config.toml", "run.json"]
    assert tracker.location() == f"{server.uri}/#/experiments/{found.info.experiment_id}/runs/{run_id(run)}"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, messages
    # refused, or cut in the middle of a request, as it happens
    assert messages[0].startswith(f"MLflow at {server.uri} is away: ")
    assert "; training continues" in messages[0]
    assert messages[1].startswith(f"MLflow at {server.uri} is back")


def test_an_unreachable_server_fails_at_the_start(run):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(WMTPError, match=r"Connection refused; check tracker\.tracking_uri"):
            MLflowTracker(tracking_uri=uri).build().start(run)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"run": {"info": {}}}', b"<html>Log in</html>"])
def test_an_address_that_answers_and_is_no_mlflow(run, body):
    """A proxy, or another service: the whole run was tracked nowhere."""

    class Nothing(Answers):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    with serving(Nothing) as server:
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(WMTPError, match=rf"{uri} (answers, but is no MLflow|cannot be used).*check tracker\.tracking_uri"):
            MLflowTracker(tracking_uri=uri).build().start(run)


def test_a_store_that_stays_away_is_said_at_the_end(run, caplog, monkeypatch):
    def away(*_, **__):
        raise ConnectionError("connection refused")

    monkeypatch.setattr("wmtp.tracking.mlflow._PATIENCE", 0.1)
    tracker = MLflowTracker().build()
    tracker.start(run)
    monkeypatch.setattr(tracker._client, "log_batch", away)
    tracker.log(1, {"a": 1.0, "b": 1.0})
    tracker.finish("finished", None)
    assert "2 metric values were not sent; metrics.jsonl has them all" in caplog.text


def test_a_database_that_cannot_be_written_is_one_line(run, caplog, monkeypatch, capfd):
    """Full, locked or broken: MLflow's own log has a traceback of it at each attempt."""
    monkeypatch.setattr("wmtp.tracking.mlflow._PATIENCE", 0.1)
    tracker = MLflowTracker().build()
    tracker.start(run)
    with sqlite3.connect(run.run_dir.parent / "mlflow.db") as database:
        database.execute("DROP TABLE latest_metrics")
    tracker.log(1, {"a": 1.0})
    while "is away: " not in caplog.text:
        time.sleep(0.05)
    tracker.finish("finished", None)
    assert "Traceback" not in capfd.readouterr().err + caplog.text


@pytest.mark.slow
def test_a_server_that_stays_away_is_said_at_the_end(server, run, caplog, monkeypatch):
    monkeypatch.setattr("wmtp.tracking.mlflow._PATIENCE", 0.5)
    tracker = MLflowTracker(tracking_uri=server.uri).build()
    tracker.start(run)
    server.kill()
    tracker.log(1, {"a": 1.0, "b": 1.0})
    tracker.finish("finished", None)
    assert "2 metric values were not sent; metrics.jsonl has them all" in caplog.text

"""A study from the first run to the last, with workers that only pretend to train, so that everything can go wrong quickly."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import tomli_w
import torch
from tiny_recipe import tiny_recipe

import wmtp
from wmtp import study
from wmtp.actions import study_pool, study_worker
from wmtp.cli import main
from wmtp.errors import ConfigError
from wmtp.reporting.records import _seconds

# What a run is to do is asked of a file with the name of its arm: fail, kill (its own process), hang, between (two runs), nan.
WORKER = """
import json, os, signal, sys, time, tomli
for line in sys.stdin:
    job = json.loads(line)
    config = tomli.loads(open(job["config"]).read())
    run, seed = os.path.join(config["run"]["output_dir"], config["run"]["name"]), config["run"]["seed"]
    arm = config["run"]["name"].rpartition("-seed")[0]
    todo = open(arm).read() if os.path.exists(arm) else ""
    with open("trained", "a") as file:
        file.write(arm + str(seed) + chr(10))
    if todo == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    answer = {"status": "failed", "error": "the loss became infinite"}
    try:
        if todo in ("hang", "between"):
            open("hangs", "w").close()
            time.sleep(600)
        if todo != "fail":
            if "ref" in config["models"]:
                assert os.path.isdir(config["models"]["ref"]["uri"])
            os.makedirs(run + "/model", exist_ok=True)
            open(run + "/config.toml", "w").write(open(job["config"]).read())
            facts = {"status": "finished", "data": {"train": "t", "eval": "e" + str(seed)}, "device": "cpu", "seed": seed}
            json.dump(facts, open(run + "/run.json", "w"))
            value = {"baseline": 3.0, "rho1": 2.0, "reference": 1.0}[arm] + seed / 100 * (1 if arm == "rho1" else 2)
            value = float("nan") if todo == "nan" else value
            line = {"step": 4, "stage": "train", "loss": value, "eval/loss": value, "tokens": 100.0}
            open(run + "/metrics.jsonl", "w").write(json.dumps(line) + chr(10))
            answer = {"status": "finished", "error": None}
    except KeyboardInterrupt:
        if todo == "between":  # as where a worker has not begun with the run that it was told
            sys.exit()
        answer = {"status": "interrupted", "error": None}
    print(json.dumps(answer), flush=True)
    if answer["status"] != "finished":
        sys.exit()
"""

STUDY = {
    "study": {
        "name": "small",
        "recipe": "recipe.toml",
        "seeds": [0, 1, 2],
        "baseline": "baseline",
        "metrics": ["eval/loss"],
        "keep_models": False,
    },
    "arms": {
        "reference": {"seeds": [7], "compared": False},
        "baseline": {},
        "rho1": {"set": {"trainer": {"type": "rho1-wmtp"}, "models": {"ref": {"type": "hf", "uri": "${arm:reference}"}}}},
    },
    "comparisons": [{"arm": "rho1"}],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = json.dumps({"prompt": "def f():", "completion": " return 1"})
    (tmp_path / "code.jsonl").write_text(f"{line}\n")
    data = {"train": {"max_length": 32, "batch_size": 2}, "eval": {"holdout": 0.5}}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tiny_recipe(data=data)))
    (tmp_path / "study.toml").write_text(tomli_w.dumps(STUDY))
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(study_pool, "_WORKER", (str(tmp_path / "worker.py"),))
    return tmp_path


def trained(folder):
    """Names what was trained since this was asked last."""
    path = folder / "trained"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


ALL = ["reference7", "baseline0", "rho10", "baseline1", "rho11", "baseline2", "rho12"]


def test_everything_is_trained_once_compared_and_skipped_afterwards(folder, capsys):
    assert main(["study", "study.toml"]) == 0
    assert trained(folder) == ALL
    out = capsys.readouterr().out
    assert "rho1 − baseline in eval/loss: -1.01 (95 % interval" in out
    assert "lower, better" in out
    models = [path.name for path in (folder / "studies/small/runs").glob("*/model")]
    assert models == []  # keep_models = false
    assert (folder / "studies/small/report.html").is_file()
    assert main(["report", "studies/small"]) == 2
    assert "is a study, whose page is " in capsys.readouterr().err
    assert (folder / "studies/small/table.csv").read_text().startswith("metric,arm,n,mean,sd,to,difference,low,high,p")

    again = study("study.toml")
    assert trained(folder) == []
    assert len(again) == 2
    assert len(again.finished) == 7
    assert (again.failed, list(again.left)) == ({}, [])


def test_a_fresh_machine_goes_on_from_the_record_alone(folder, caplog):
    study("study.toml", seeds=[0, 1])
    trained(folder)
    shutil.rmtree(folder / "studies/small/runs")
    assert study("study.toml", dry_run=True).facts["runs"] == "7; 5 done, 0 failed, 3 to do, 1 at once"
    caplog.set_level("INFO", "wmtp")
    found = study("study.toml")
    assert "its model, which is not here; 2 runs that are done had the earlier one, which may differ" in caplog.text
    assert trained(folder) == ["reference7", "baseline2", "rho12"]  # the reference's weights were not in the record
    assert [row["n"] for row in found.rows] == [3, 3]
    size = sum(path.stat().st_size for path in (folder / "studies/small/record").iterdir())
    assert size < 100_000


def test_a_study_without_a_run_that_ended_well_shows_no_table_and_no_page(folder, capsys):
    (folder / "reference").write_text("fail")
    (folder / "baseline").write_text("fail")
    assert main(["study", "study.toml"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("No two arms have a finished run")
    assert "mean ± sd" not in out
    assert "report.html" not in out


def test_a_failure_is_one_runs_own_and_is_retried_on_request(folder, capsys):
    (folder / "rho1").write_text("fail")
    assert main(["study", "study.toml"]) == 1
    assert trained(folder) == ALL
    assert "rho1-seed1" in (errors := capsys.readouterr().err)
    assert "the loss became infinite" in errors
    (folder / "rho1").unlink()
    assert main(["study", "study.toml"]) == 1
    assert trained(folder) == []
    assert main(["study", "study.toml", "--retry"]) == 0
    assert trained(folder) == ["rho10", "rho11", "rho12"]  # the reference's model was kept for them


def test_what_needs_a_failed_run_is_skipped_and_named(folder, caplog):
    (folder / "reference").write_text("fail")
    found = study("study.toml")
    said = [record.getMessage() for record in caplog.records]
    assert all("its log: " in line for line in said if ": failed: " in line)
    assert not any("its log: " in line for line in said if ": skipped: " in line), "it was not begun, and has none"
    assert sum(": skipped: " in line for line in said) == 3
    assert trained(folder) == ["reference7", "baseline0", "baseline1", "baseline2"]
    assert len(found.failed) == 4
    assert {reason.partition(",")[0] for name, reason in found.failed.items() if name.startswith("rho1")} == {
        f"it needs {next(name for name in found.failed if name.startswith('reference'))}"
    }
    (folder / "reference").unlink()
    assert not study("study.toml", retry=True).failed


def test_a_process_that_dies_takes_one_run_with_it(folder):
    (folder / "rho1").write_text("kill")
    found = study("study.toml", seeds=[0], jobs=2)
    assert list(found.failed.values()) == ["its process ended by signal SIGKILL, as the system does where memory runs out"]
    assert len(found.finished) == 2


def test_more_runs_at_once_than_memory_holds_are_refused_before_one_begins(folder, monkeypatch):
    monkeypatch.setattr("wmtp.cores.host_memory", lambda: 2**30)
    with pytest.raises(wmtp.ConfigError, match=r"^--jobs: 3 runs at once take 1.26 GB before .* has 1.07 GB; write at most 2$"):
        study("study.toml", seeds=[0], jobs=10**6)
    assert trained(folder) == []
    study("study.toml", seeds=[0], jobs=10**6, arms=["baseline"])
    assert trained(folder) == ["baseline0"]
    monkeypatch.setattr("wmtp.cores.host_memory", lambda: 2**32)
    study("study.toml", seeds=[0])
    monkeypatch.setattr("wmtp.cores.host_memory", lambda: 2**30)
    study("study.toml", seeds=[0], jobs=10**6)  # where nothing is left to do, the table is for any machine


@pytest.mark.parametrize("todo", ["hang", "between"])
def test_ctrl_c_waits_for_the_runs_and_begins_no_other(folder, todo):
    (folder / "rho1").write_text(todo)
    script = folder / "go.py"
    script.write_text(
        "import sys\nfrom wmtp.actions import study_pool\nfrom wmtp.cli import main\n"
        f"study_pool._WORKER = ({str(folder / 'worker.py')!r},)\nsys.exit(main(['study', 'study.toml']))\n"
    )
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True)
    while not (folder / "hangs").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "5 runs are left; the same command continues" in errors
    assert trained(folder) == ["reference7", "baseline0", "rho10"]
    (folder / "rho1").unlink()
    study("study.toml")
    assert trained(folder) == ["rho10", "baseline1", "rho11", "baseline2", "rho12"]


def test_a_worker_of_a_study_in_the_background_of_a_script_hears_of_ctrl_c():
    words = [sys.executable, "-m", "wmtp.actions.study_worker"]
    inherits = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=inherits) as worker:
        try:
            until = time.monotonic() + 300
            while worker.poll() is None and time.monotonic() < until:
                worker.send_signal(signal.SIGINT)
                time.sleep(0.2)
            assert worker.poll() is not None
        finally:
            worker.kill()


@pytest.mark.parametrize(("result", "status"), [(SimpleNamespace(status="finished"), "finished"), (None, "interrupted")])
def test_ctrl_c_when_a_run_is_done_leaves_it_done(tmp_path, monkeypatch, result, status):
    def run(*_, **__):
        error = KeyboardInterrupt()
        if result is not None:
            error.result = result
        raise error

    (tmp_path / "config.toml").write_text("")
    monkeypatch.setattr("wmtp.api.run", run)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # this process keeps its streams
    monkeypatch.setattr(sys, "argv", [])
    job = {"log": str(tmp_path / "log"), "config": str(tmp_path / "config.toml"), "argv": [], "allow_code_execution": False}
    threads = torch.get_num_threads()
    assert study_worker._train(job, threads) == {"status": status, "error": None, "threads": threads}


def test_runs_of_an_edited_arm_no_longer_count_and_that_is_said(folder, capsys):
    study("study.toml", seeds=[0, 1])
    trained(folder)
    edited = json.loads(json.dumps(STUDY))
    edited["arms"]["rho1"]["set"]["trainer"]["mode"] = "weighted"
    (folder / "study.toml").write_text(tomli_w.dumps(edited))
    capsys.readouterr()
    main(["study", "study.toml"])
    said = capsys.readouterr().err
    assert "2 runs no longer count, 3 still do; of another config than now: rho1-seed0-" in said
    assert said.count(" (trainer.mode)") == 2
    assert trained(folder) == ["rho10", "rho11", "baseline2", "rho12"]


def test_the_same_model_in_the_folder_of_another_study_is_no_change_of_the_config(folder, capsys):
    study("study.toml", seeds=[0])
    edited = json.loads(json.dumps(STUDY))
    edited["study"]["name"] = "other"
    edited["arms"]["rho1"]["set"]["trainer"]["mode"] = "weighted"
    shutil.copytree(folder / "studies/small/record", folder / "studies/other/record")
    (folder / "study.toml").write_text(tomli_w.dumps(edited))
    capsys.readouterr()
    main(["study", "study.toml", "--dry-run"])
    said = capsys.readouterr().err
    assert re.search(
        r"1 run no longer counts, 2 still do; of another config than now: rho1-seed0-\w+ \(trainer\.mode\)$", said, re.M
    )


def test_a_metric_that_no_run_has_is_said_after_the_first_and_an_error_with_its_line(folder, caplog):
    (folder / "study.toml").write_text(tomli_w.dumps({**STUDY, "study": {**STUDY["study"], "metrics": ["eval-loss"]}}))
    wanted = r"study.toml:\d+: study.metrics: no run has 'eval-loss'; did you mean 'eval/loss'\?"
    with caplog.at_level(logging.INFO, "wmtp"), pytest.raises(ConfigError, match=wanted):
        study("study.toml", seeds=[0])
    said = [record.getMessage() for record in caplog.records]
    assert "study.metrics: 'eval-loss' is no metric that is known before a run is done; did you mean 'eval/loss'?" in said
    first = next(number for number, line in enumerate(said) if line.startswith("2/3 baseline"))
    assert said[first + 1] == "study.metrics: no finished run has 'eval-loss'; did you mean 'eval/loss'?"


def test_a_comparison_of_a_metric_that_no_run_has_is_an_error_and_not_left_out(folder):
    (folder / "study.toml").write_text(tomli_w.dumps({**STUDY, "comparisons": [{"arm": "rho1", "metric": "eval-loss"}]}))
    wanted = r"study.toml:\d+: comparisons\.?\[?0\]?\.metric: no run has 'eval-loss'; did you mean 'eval/loss'\?"
    with pytest.raises(ConfigError, match=wanted):
        study("study.toml", seeds=[0])


def test_a_metric_that_no_run_has_is_said_where_an_arm_has_failed_too(folder):
    (folder / "rho1").write_text("fail")
    (folder / "study.toml").write_text(tomli_w.dumps({**STUDY, "study": {**STUDY["study"], "metrics": ["eval-loss"]}}))
    table = study("study.toml", seeds=[0]).table
    assert "study.metrics: no finished run has 'eval-loss'; did you mean 'eval/loss'?" in table.notes
    assert study("study.toml", dry_run=True).facts["metrics"].startswith("study.metrics: no finished run has 'eval-loss'")
    assert (
        table.sentence()
        == "No two arms have a finished run with a metric that is compared yet, so there is nothing to compare."
    )


def test_a_run_whose_loss_is_no_number_ends_in_a_table_and_a_page_now_and_later(folder):
    (folder / "rho1").write_text("nan")
    first = study("study.toml")
    assert not first.failed
    assert "eval/loss of rho1 is not finite and left out (seed 0, 1, 2)" in first.table.notes
    assert (folder / "studies/small/report.html").is_file()
    assert study("study.toml").table == first.table


def test_one_seed_has_no_interval_and_that_is_said(folder):
    one = {**STUDY, "study": {**STUDY["study"], "seeds": [0]}}
    found = study(one, recipe="recipe.toml")
    assert found.table.sentence().endswith("from one seed: no interval, so nothing can be said of chance.")
    assert [row["verdict"] for row in found.rows] == ["", "one seed: no interval"]
    assert any(note.startswith("every arm has one seed") for note in found.table.notes)


def test_a_dry_run_says_hours_before_a_run_is_done_and_after(folder):
    dry = partial(study, "study.toml", dry_run=True)
    long = dry(overrides=["train.max_steps=1000000"]).facts
    assert long["tokens"] == f"at most {7 * 1000000 * 2 * 32:,}"
    assert re.fullmatch(
        r"H100 about [\d.]+ h; H200 about [\d.]+ h; A100 about [\d.]+ h, one run after another, .*", long["time"]
    )
    one = dry(overrides=["train.max_steps=1000000"], arms=["baseline"], seeds=[0]).facts["time"]
    assert float(long["time"].split()[2]) == pytest.approx(7 * float(one.split()[2]), rel=0.1)  # each is rounded
    assert dry(overrides=["devices.device=cpu"]).facts["time"] == "not known before a run is done"
    study("study.toml", seeds=[0])
    assert dry().facts["time"].endswith("hours, going by the runs that are done")


def test_time_that_is_over_begins_no_run(folder):
    assert len(study("study.toml", minutes=0.0).left) == 7
    assert trained(folder) == []


def _takes(folder, arm, seconds):
    for path in (folder / "studies/small/record").glob(f"{arm}-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}))


def test_a_run_that_takes_too_long_does_not_keep_shorter_ones_from_beginning(folder, capsys):
    study("study.toml", seeds=[0])
    trained(folder)
    _takes(folder, "baseline", 600.0)
    _takes(folder, "rho1", 0.1)
    assert main(["study", "study.toml", "--minutes", "5"]) == 0
    assert trained(folder) == ["rho11", "rho12"]
    said = capsys.readouterr()
    assert re.search(r"--minutes: baseline-seed1-\w+ would not be done by then; what is shorter still begins", said.err)
    assert "baseline-seed2" not in said.err
    assert "2 runs are left" in said.out


def test_what_needs_a_run_that_takes_too_long_is_left_too(folder):
    study("study.toml", seeds=[0])
    trained(folder)
    _takes(folder, "reference", 600.0)
    _takes(folder, "baseline", 0.1)
    shutil.rmtree(next((folder / "studies/small/runs").glob("reference-*/model")))
    result = study("study.toml", minutes=5, jobs=2)
    assert sorted(trained(folder)) == ["baseline1", "baseline2"]
    assert [name.rpartition("-")[0] for name in result.left] == ["rho1-seed1", "rho1-seed2"]
    assert any(name.startswith("reference") for name in result.finished), "its record is kept until it is trained again"
    assert list((folder / "studies/small/record").glob("reference-*.json"))


def test_two_processes_do_not_work_on_one_study(folder):
    (folder / "baseline").write_text("hang")
    first = threading.Thread(target=lambda: study("study.toml", seeds=[0]), daemon=True)
    first.start()
    while not (folder / "hangs").exists():
        time.sleep(0.02)
    with pytest.raises(ConfigError, match="another process works on this study"):
        study("study.toml")
    for worker in _workers(folder):
        os.kill(worker, signal.SIGTERM)
    first.join(300)
    assert not first.is_alive(), "it would go on in the folder of the next test"


def _workers(folder):
    done = subprocess.run(["pgrep", "-f", str(folder / "worker.py")], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def test_the_result_is_like_a_frame(folder, tmp_path):
    found = study("study.toml", seeds=[0, 1])
    assert found.to_csv() == (folder / "studies/small/table.csv").read_text()
    assert [row["arm"] for row in found.rows] == [row.arm for row in found] == ["baseline", "rho1"]
    assert "<table>" in found._repr_html_()
    pandas = pytest.importorskip("pandas")
    assert isinstance(found.to_pandas(), pandas.DataFrame)
    assert found.to_pandas().set_index("arm").loc["rho1", "pairs"] == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read as JSON.*; remove it: "),
        ('{"name": "rho1-se', "cannot be read as JSON.*; remove it: "),
        ("null", "holds no JSON object; remove it: "),
        ('{"name": "a", "arm": "a", "seed": 0, "key": "", "status": "finished", "metrics": []}', "'metrics' must be .*Mapping"),
        (
            '{"name": "rho1-seed0", "arm": "rho1", "seed": 0, "key": "", "status": "finished"}',
            "is a copy of the record of 'rho1-seed0'",
        ),
    ],
)
def test_a_damaged_record_is_named(folder, capsys, text, reason):
    study("study.toml", seeds=[0])
    path = next((folder / "studies/small/record").glob("rho1*"))
    path.write_text(text)
    assert main(["study", "study.toml"]) == 2
    assert re.search(rf"error: .*{path.name}: .*({reason})", capsys.readouterr().err)


def test_a_record_of_another_study_is_left_out_and_is_no_change_of_the_config(folder, capsys):
    study("study.toml", seeds=[0])
    facts = {"name": "alien-seed0", "arm": "alien", "seed": 0, "key": "", "status": "finished", "metrics": {"eval/loss": 1.0}}
    (folder / "studies/small/record/alien-seed0.json").write_text(json.dumps(facts))
    assert main(["study", "study.toml", "--seeds", "0"]) == 0
    said = capsys.readouterr().err
    assert "1 run left out, of arms or seeds that this study does not have: alien-seed0" in said
    assert "configs have changed" not in said


def test_a_folder_that_cannot_be_made_is_named(folder, capsys):
    (folder / "studies/small").mkdir(parents=True)
    (folder / "studies/small/record").touch()
    assert main(["study", "study.toml"]) == 2
    assert re.search(r"study.output_dir: cannot write to \S+/studies/small/record: File exists", capsys.readouterr().err)


@pytest.mark.parametrize("minutes", ["nan", "-1"])
def test_minutes_that_are_no_time_are_refused(folder, capsys, minutes):
    assert main(["study", "study.toml", "--minutes", minutes]) == 2
    assert "error: --minutes: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("info", "seconds"),
    [
        ({"started": "2026-11-29T10:00:00+00:00", "ended": "2026-11-29T12:00:30+01:00"}, 3630.0),
        ({"started": "2026-11-29T10:00:00+00:00", "ended": "2026-11-29T09:00:00+00:00"}, 0.0),  # the clock was set back
        ({"started": "2026-11-29T10:00:00", "ended": "2026-11-29T11:00:00+00:00"}, 0.0),
        ({"started": "2026-11-29T10:00:00+00:00"}, 0.0),
    ],
)
def test_a_run_takes_no_negative_time(info, seconds):
    assert _seconds(info) == seconds

"""``wmtp run --resume``: by directory, by name and by config."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_recipe import cli, folder, run_json

import wmtp

__all__ = ["folder"]


def launches(run_dir):
    return (Path(run_dir) / "launches").read_text().split()


def test_resume_by_directory_with_and_without_the_config(capsys, folder):
    run_json(capsys, "--run-name", "x", "--set", "launcher.do=stop")
    code, _, err = cli(capsys, "run", "--resume", "runs/x", "--set", "launcher.do=train")
    assert code == 0
    assert 'resumed with a change: launcher.do: "stop" → "train"' in err
    assert cli(capsys, "run", "a.toml", "--resume", "runs/x")[0] == 0
    assert launches("runs/x") == ["False", "True", "True"]
    facts = json.loads((folder / "runs/x/run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["resumed"][0]["changed"] == ['launcher.do: "stop" → "train"']
    assert wmtp.load_config("runs/x/config.toml").launcher.do == "train"


def test_resume_with_another_config_names_every_difference(capsys):
    run_json(capsys, "--run-name", "x")
    code, answer, _ = run_json(
        capsys, "--resume", "runs/x", "--set", "train.max_steps=10", "--set", "optimizer.lr=1", "--set", "run.seed=2"
    )
    assert code == 2
    changes = [line.rpartition("run's: ")[2] for line in answer["problems"] if "run's: " in line]
    assert changes == ["run.seed: 0 → 2", "optimizer.lr: 2e-05 → 1.0", "train.max_steps: 9 → 10"]
    assert "the learning rate of every step was planned" in "".join(answer["problems"])
    assert launches("runs/x") == ["False"]
    code, answer, _ = run_json(capsys, "--resume", "runs/x", "--set", "schedule.warmup_steps=2")
    assert "schedule.warmup_steps: not set → 2" in answer["problems"][0]


def test_a_resumed_run_keeps_its_name(capsys):
    run_json(capsys, "--run-name", "x")
    assert run_json(capsys, "--resume", "runs/x")[0] == 0
    assert wmtp.load_config("runs/x/config.toml").run.name == "x"
    code, answer, _ = run_json(capsys, "--resume", "runs/x", "--run-name", "y")
    assert (code, answer["error"]) == (2, "--run-name: a resumed run keeps its name; leave it out, or write --resume auto")


def test_resume_auto_with_a_name(capsys):
    assert run_json(capsys, "--run-name", "x", "--resume", "auto")[0] == 0
    assert run_json(capsys, "--run-name", "x", "--resume", "auto")[0] == 0
    assert launches("runs/x") == ["False", "True"]


def test_resume_auto_without_a_name(capsys):
    stop = ("--set", "launcher.do=stop", "--resume", "auto")
    code, answer, err = run_json(capsys, *stop)
    assert code == 1
    assert f"to resume: wmtp run --resume {answer['run_dir']}" in err
    first = answer["run_dir"]
    run_json(capsys, "--run-name", "named", "--set", "launcher.do=stop")
    assert run_json(capsys, *stop)[1]["run_dir"] == first
    assert run_json(capsys, *stop, "--set", "run.seed=7")[1]["run_dir"] != first  # another config is another run
    assert run_json(capsys, "--resume", "auto")[1]["run_dir"] == first
    assert run_json(capsys, "--resume", "auto")[1]["run_dir"] != first  # it is finished now
    assert launches(first) == ["False", "True", "True"]


@pytest.mark.parametrize(("path", "found"), [("runs/none", "does not exist"), ("site", "holds no run (no config.toml)")])
def test_resume_of_what_is_no_run(capsys, path, found):
    code, _, err = cli(capsys, "run", "--resume", path)
    assert (code, err) == (2, f"error: --resume {path}: {found}\n")


def test_two_processes_never_run_in_one_directory(capsys, folder):
    command = [sys.executable, "-m", "wmtp", "run", "a.toml", "--run-name", "x", "--set", "launcher.do=wait"]
    other = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (folder / "waiting").exists():
            assert other.poll() is None
            time.sleep(0.05)
        code, _, err = cli(capsys, "run", "a.toml", "--resume", "runs/x")
        assert code == 2
        assert f"another process is running there (process {other.pid} on " in err
    finally:
        other.kill()
        other.wait()
    assert cli(capsys, "run", "a.toml", "--resume", "runs/x")[0] == 0  # the lock died with its owner
    with open(folder / "runs/x/.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and is given back after a run

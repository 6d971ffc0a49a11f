"""``wmtp study`` with real training: each run is as if it were alone, and Ctrl-C inside one loses nothing."""

import json
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
from conftest import ROOT, command, environment

STUDY = """
[study]
name = "small"
recipe = "recipe.toml"
seeds = [3]
baseline = "baseline"
metrics = ["eval/loss/head_1"]

[set]
train.max_steps = {steps}
checkpoints.save_final = false

[arms.reference]
compared = false
set.models.base.heads = {{ horizon = 1, warmup_steps = 0 }}

[arms.baseline]

[arms.rho1.set]
trainer.type = "rho1-wmtp"
models.ref = {{ type = "hf", uri = "${{arm:reference}}" }}
"""


def losses(run):
    return [
        {name: value for name, value in json.loads(line).items() if "loss" in name}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def study(folder):
    return subprocess.run(
        command("study", "study.toml", "--json"), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )


def test_runs_of_one_process_are_as_if_each_were_alone(recipe, wmtp, tmp_path):
    (tmp_path / "study.toml").write_text(STUDY.format(steps=8))
    done = study(tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [row["arm"] for row in answer["rows"]] == ["baseline", "rho1"]
    rho1 = next((tmp_path / "studies/small/runs").glob("rho1-*"))
    alone = wmtp("run", str(rho1 / "config.toml"), "--run-name", "alone", "--set", f"run.output_dir={tmp_path}/runs")
    assert alone.returncode == 0, alone.stderr
    assert losses(tmp_path / "runs" / "alone") == losses(rho1)
    tokenized = [path for path in (tmp_path / "studies/small/tokens").iterdir() if path.is_dir()]
    assert len(tokenized) == 1  # once for all runs


@pytest.mark.slow
def test_ctrl_c_inside_a_run_is_resumed_to_the_same_numbers(recipe, tmp_path):
    (tmp_path / "study.toml").write_text(STUDY.format(steps=400))
    process = subprocess.Popen(
        command("study", "study.toml"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    runs = tmp_path / "studies/small/runs"
    while not any(len(path.read_text().splitlines()) > 20 for path in runs.glob("baseline-*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    baseline = next(runs.glob("baseline-*"))
    assert json.loads((baseline / "run.json").read_text())["status"] == "interrupted"
    assert study(tmp_path).returncode == 0
    assert len(json.loads((baseline / "run.json").read_text())["resumed"]) == 1
    assert [line["step"] for line in map(json.loads, (baseline / "metrics.jsonl").read_text().splitlines())] == [*range(1, 401)]


@pytest.mark.slow
def test_the_quickstart_study_shows_an_effect_and_its_control(tmp_path):
    script = [sys.executable, ROOT / "bench" / "evidence" / "planted.py", "data/planted", sysconfig.get_path("stdlib")]
    planted = "--kind blobs --functions 600 --reference 600 --heldout 60 --shortest 80 --longest 400"
    subprocess.run([*script, *planted.split()], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    settings = ("--set", "train.max_steps=60", "--set", "schedule.warmup_steps=10")
    done = subprocess.run(
        command("study", ROOT / "examples" / "study-quickstart.toml", "--json", "--jobs", "1", "--seeds", "0", *settings),
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    means = {row["arm"]: row["mean"] for row in json.loads(done.stdout)["rows"] if row["metric"] == "eval/loss/head_1"}
    assert means["rho1"] < means["baseline"] - 0.02
    assert means["column"] < means["baseline"] - 0.02
    assert means["shuffled"] > means["rho1"] + 0.02  # the same weights on other tokens: it is the assignment

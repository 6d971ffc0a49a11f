"""Faults of real life end in one clear line, and nothing is lost or half-written."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import environment

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, 100 * 1024))
from wmtp.cli import run_from_shell
run_from_shell()
"""


def test_a_file_that_cannot_grow_any_more(recipe, preloaded, tmp_path):
    """A write that fails half-way, here after 100 kB, as where the disk is full."""
    run = preloaded.run("run", recipe, "--run-name", "x", code=LIMITED)
    assert run.returncode == 1, run.stderr
    assert "error: " in run.stderr
    assert "step-5" in run.stderr
    assert "could not be written" in run.stderr
    assert "Traceback" not in run.stderr
    assert not list((tmp_path / "runs/x/checkpoints").glob("*"))
    assert not (tmp_path / "runs/x/model").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_the_checkpoints_before_it(recipe, wmtp, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        run = wmtp("run", recipe, "--run-name", "x", "--set", f"checkpoints.uri={disk}/c", "--set", "checkpoints.keep_last=0")
        assert run.returncode == 1, run.stderr
        assert "could not be written: the disk is full" in run.stderr
        assert "Traceback" not in run.stderr
        saved = sorted((path.name for path in (disk / "c").iterdir()), key=lambda name: int(name.partition("-")[2]))
        assert saved, "the disk should have room for one checkpoint"
        assert all(name.startswith("step-") for name in saved)
        assert f"the last good checkpoint is {disk}/c/{saved[-1]}" in run.stderr
        again = wmtp("run", "--resume", tmp_path / "runs/x", "--set", "checkpoints.keep_last=1", "--json")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["steps"] == 40
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_an_infinite_loss_stops_with_the_examples_and_the_last_good_checkpoint(recipe, wmtp, tmp_path):
    run = wmtp("run", recipe, "--run-name", "x", "--set", "optimizer.lr=1e30", "--set", "train.max_grad_norm=0",
               "--set", "schedule.warmup_steps=30", "--set", "checkpoints.save_interval=1")  # fmt: skip
    assert run.returncode == 1, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "the loss is nan" in line
    assert "the batch holds the examples f" in line
    good = [path for path in (tmp_path / "runs/x/checkpoints").iterdir() if str(path) in line]
    assert len(good) == 1
    step = int(line.split("step ")[1].split(":")[0])
    assert int(good[0].name.partition("-")[2]) < step


def test_a_damaged_checkpoint_is_named(recipe, wmtp, tmp_path):
    assert wmtp("run", recipe, "--run-name", "x", "--set", "checkpoints.keep_last=0").returncode == 0
    newest = tmp_path / "runs/x/checkpoints/step-40"
    state = newest / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    run = wmtp("run", "--resume", tmp_path / "runs/x")
    assert run.returncode == 2
    assert "error: " in run.stderr
    assert str(state) in run.stderr
    assert "Traceback" not in run.stderr


def test_a_process_killed_while_it_writes_leaves_nothing_that_looks_whole(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from wmtp.storage.atomic import write_folder
def write(folder):
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
write_folder(Path(sys.argv[1]) / "step-7", write)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=environment())
    assert done.returncode == -signal.SIGKILL

    from wmtp.checkpoints.local import list_checkpoints
    from wmtp.storage.atomic import remove_partial

    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    assert list_checkpoints(tmp_path) == []
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train.max_length=4096"], ["data.train.max_length", "128"]),
        (["models.base.heads.horizon=70"], ["models.base.heads.horizon"]),
        (['tokenizer.type="hf-transformers"'], ["tokenizer"]),
        (["datasets.code.uri=nowhere.jsonl"], ["datasets.code.uri", "nowhere.jsonl"]),
        (["models.base.vocab_size=100"], ["100", "258"]),
        (["trainer.type=baseline-mpt"], ["did you mean 'baseline-mtp'?"]),
        (['devices.device="mps"'], ["devices.device"]),
        (["models.base.heads.head_weights=[1.0]"], ["head_weights"]),
        (["models.base.heads.horizon=1"], ["warmup_steps"]),
        (
            ['tracker={type="mlflow", tracking_uri="hdfs://host/mlruns"}'],
            ["tracker.tracking_uri", "no installed plugin serves hdfs://"],
        ),
    ],
)
def test_a_mistake_in_the_config_is_one_line_and_exit_2(recipe, wmtp, overrides, words):
    run = wmtp("run", recipe, "--run-name", "x", *(part for override in overrides for part in ("--set", override)))
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert errors
    for word in words:
        assert any(word in line for line in errors), (word, run.stderr)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["code.jsonl"]),
        ('{"prompt": "", "completion": ""}\n', ["code"]),
        ('{"text": "abc"}\n{"text": \n', ["code.jsonl:2"]),
        ('{"txt": "abc"}\n', ["code.jsonl:1"]),
    ],
)
def test_bad_data_names_file_and_line(recipe, wmtp, tmp_path, content, words):
    (tmp_path / "code.jsonl").write_text(content)
    run = wmtp("run", recipe, "--run-name", "x")
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert any(line.startswith("error: ") for line in run.stderr.splitlines())
    for word in words:
        assert word in run.stderr

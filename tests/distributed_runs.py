"""Runs of several processes: their curves, steps and models."""

import json
import time
from pathlib import Path

__all__ = ["TWO", "assert_same_model", "assert_whole", "curve", "errors", "steps_so_far", "wait_for_step", "workers"]


TWO = ("--set", "launcher.processes=2")


def curve(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps_so_far(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_step(process, run_dir, step):
    while steps_so_far(run_dir) < step and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def workers(process):
    """The process of each rank that a launcher has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in children}  # as tests/preloaded.py names them
    return {int(name.removeprefix("rank-")): int(pid) for pid, name in names.items()}


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def assert_whole(run_dir):
    found = list((run_dir / "checkpoints").glob("step-*"))
    for checkpoint in found:
        facts = json.loads((checkpoint / "checkpoint.json").read_text())
        assert {name: (checkpoint / name).stat().st_size for name in facts["files"]} == facts["files"]
    return found


def assert_same_model(one, other):
    from safetensors.torch import load_file

    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    for file in files:
        left, right = load_file(one / file), load_file(other / file)
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert (tensor - right[name]).abs().max() < 1e-4, (file, name)

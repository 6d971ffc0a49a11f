"""Processes on two machines: two network namespaces."""

import json
import os
import shutil
import subprocess

import pytest
from distributed_runs import TWO, assert_same_model, curve


def _namespaces():
    """Two network namespaces with a cable between them; None where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return None
    names = [f"wmtp-{os.getpid()}-{number}" for number in range(2)]
    steps = [["ip", "netns", "add", name] for name in names]
    steps.append(["ip", "link", "add", "w0", "netns", names[0], "type", "veth", "peer", "name", "w1", "netns", names[1]])
    for number, name in enumerate(names):
        inside = ["ip", "-n", name]
        steps.append([*inside, "addr", "add", f"10.99.7.{number + 1}/24", "dev", f"w{number}"])
        steps += [[*inside, "link", "set", link, "up"] for link in (f"w{number}", "lo")]
    for step in steps:
        if subprocess.run(step, capture_output=True).returncode:
            _remove(names)
            return None
    return names


def _remove(names):
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


#: runs a command in the network namespace of this name
INSIDE = """
import ctypes, os, sys
from wmtp.cli import run_from_shell
if ctypes.CDLL(None, use_errno=True).setns(os.open(f"/run/netns/{sys.argv.pop(1)}", os.O_RDONLY), 0):
    sys.exit(os.strerror(ctypes.get_errno()))
run_from_shell()
"""


@pytest.mark.slow
def test_two_machines_with_one_process_each_equal_one(recipe, wmtp, preloaded, tmp_path):
    names = _namespaces()
    if names is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        measured = ("--set", "train.max_steps=8", "--set", 'eval=[{type="perplexity"}]')
        variables = os.environ | {"WMTP_NNODES": "2", "WMTP_MASTER_ADDR": "10.99.7.1"}
        processes = [
            preloaded.start(
                *(name, "run", recipe, "--run-name", "two", *measured),
                code=INSIDE,
                env=variables | {"WMTP_NODE_RANK": str(number)},
            )
            for number, name in enumerate(names)
        ]
        ended = [process.communicate(timeout=400) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], ended
        one = wmtp("run", recipe, "--run-name", "one", *measured)
        assert one.returncode == 0, one.stderr
        for left, right in zip(curve(tmp_path / "runs/two"), curve(tmp_path / "runs/one"), strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
            assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-4)
        evaluation = [json.loads((tmp_path / f"runs/{name}/evaluation.json").read_text()) for name in ("two", "one")]
        assert evaluation[0] == pytest.approx(evaluation[1], rel=1e-5)
        assert_same_model(tmp_path / "runs/two/model", tmp_path / "runs/one/model")
    finally:
        _remove(names)


def _on_two_machines(preloaded, names, *arguments, processes=("2", "2"), timeout=400):
    """Start a command in each namespace; return exit codes and what was written."""
    variables = os.environ | {"WMTP_NNODES": "2", "WMTP_MASTER_ADDR": "10.99.7.1"}
    started = [
        preloaded.start(
            *(name, "run", *arguments, "--set", f"launcher.processes={count}"),
            code=INSIDE,
            env=variables | {"WMTP_NODE_RANK": str(number)},
        )
        for number, (name, count) in enumerate(zip(names, processes, strict=True))
    ]
    ended = [process.communicate(timeout=timeout) for process in started]
    return [process.returncode for process in started], ended


@pytest.mark.slow
def test_a_hybrid_run_on_two_machines_equals_one_process_and_resumes_elsewhere(recipe, wmtp, preloaded, tmp_path):
    names = _namespaces()
    if names is None:
        pytest.skip("network namespaces need root and iproute2")
    settings = ("--set", "data.train.batch_size=8", "--set", "data.train.micro_batch_size=1", "--set", "train.eval_interval=4",
                "--set", "schedule.type=constant")  # fmt: skip
    hybrid = ("--set", 'devices.fsdp.strategy="hybrid"')
    try:
        one = wmtp("run", recipe, "--run-name", "one", "--set", "train.max_steps=12", *settings)
        assert one.returncode == 0, one.stderr
        expected = curve(tmp_path / "runs/one")

        def compare(run_dir, steps):
            found = curve(run_dir)
            assert len(found) == steps
            for left, right in zip(found, expected, strict=False):
                for key in right.keys() - {"tokens_per_second", "peak_memory_gib", "stage"}:
                    assert left[key] == pytest.approx(right[key], rel=1e-4, abs=1e-6), (run_dir, left["step"], key)

        codes, ended = _on_two_machines(
            preloaded, names, recipe, "--run-name", "two", "--set", "train.max_steps=8", *settings, *hybrid
        )
        assert codes == [0, 0], ended
        compare(tmp_path / "runs/two", 8)
        # the same checkpoint, continued by one process, by two that shard it, and by two machines
        for name in ("single", "full"):
            shutil.copytree(tmp_path / "runs/two", tmp_path / name / "two")
        more = ("--set", "train.max_steps=12", *settings)
        for name, own in (("single", ()), ("full", (*TWO, "--set", 'devices.fsdp.strategy="full"'))):
            run = wmtp("run", recipe, "--resume", tmp_path / name / "two", *more, *own)
            assert run.returncode == 0, run.stderr
            compare(tmp_path / name / "two", 12)
        codes, ended = _on_two_machines(preloaded, names, recipe, "--run-name", "two", "--resume", "auto", *more, *hybrid)
        assert codes == [0, 0], ended
        compare(tmp_path / "runs/two", 12)
        for name in ("runs", "single", "full"):
            assert_same_model(tmp_path / name / "two/model", tmp_path / "runs/one/model")
    finally:
        _remove(names)

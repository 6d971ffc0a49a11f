"""Several processes, by gloo on the CPU: the same result as one, and a clear end when one of them dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crossings import sampled
from distributed_runs import TWO, assert_whole, curve, errors, steps_so_far, wait_for_step, workers
from small_server import free_port

HERE = Path(__file__).parent


TORCHRUN = "from torch.distributed.run import main\nmain()"


@pytest.mark.parametrize("script", sampled(["steps.py", "steps.py all", "stages.py"], 3))
def test_two_ranks_do_the_same_as_one(preloaded, script):
    """The same step, for every trainer, kind of head and strategy; and compiled layers follow from stage to stage."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    file, *arguments = script.split()
    command = ("--standalone", "--nproc-per-node=2", HERE / "ranks" / file, *arguments)
    run = preloaded.run(*command, code=TORCHRUN, env=env, timeout=500)
    assert run.returncode == 0, "\n".join(line for line in run.stderr.splitlines() if "[rank0]" in line or "Error" in line)
    assert "all equal" in run.stdout


@pytest.mark.parametrize("strategy", sampled(["full", "none"], 2))
def test_ranks_read_their_own_parts_of_the_files(preloaded, tmp_path, strategy):
    """No rank holds the whole model in fp32, or reads more than it keeps; the numbers are those of one process."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command = ("--standalone", "--nproc-per-node=2", HERE / "ranks/loading.py", tmp_path, strategy)
    run = preloaded.run(*command, code=TORCHRUN, env=env, timeout=500)
    assert run.returncode == 0, "\n".join(line for line in run.stderr.splitlines() if "[rank0]" in line or "Error" in line)
    assert "all equal" in run.stdout


@pytest.mark.parametrize("settings", sampled(["", "all"], 2), ids=["sample", "all"])
def test_two_machines_of_two_ranks_do_the_same_as_one_rank(preloaded, settings):
    """``hybrid``: the same steps, gradients that cross the network once a step, and checkpoints that open in other layouts."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command = ("--standalone", "--nproc-per-node=4", HERE / "ranks/hybrid.py", *settings.split())
    run = preloaded.run(*command, code=TORCHRUN, env=env, timeout=500)
    assert run.returncode == 0, "\n".join(line for line in run.stderr.splitlines() if "[rank0]" in line or "Error" in line)
    assert "all equal" in run.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_killed_on_two_stopped_on_one_stopped_on_two_and_still_the_same_run(recipe, wmtp, preloaded, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} and {i + 1}. " * 3}) + "\n" for i in range(20)))
    recipe.write_text(
        recipe.read_text().replace("max_length = 64", "max_length = 64\nmixture = { code = 0.3, text = 0.7 }")
        + f'[datasets.text]\ntype = "jsonl"\nuri = "{tmp_path}/text.jsonl"\n'
    )
    overrides = ("--set", "train.max_steps=2000", "--set", "data.train.batch_size=3")
    whole = wmtp("run", recipe, "--run-name", "whole", "--set", "train.max_steps=60", *overrides[2:],
                 "--set", "schedule.type=constant", "--set", "train.eval_interval=50")  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    expected = curve(tmp_path / "runs/whole")

    arguments = ("run", recipe, "--run-name", "x", "--resume", "auto", *overrides, "--set", "schedule.type=constant",
                 "--set", "train.eval_interval=50")  # fmt: skip
    run_dir = tmp_path / "runs/x"
    process = preloaded.start(*arguments, *TWO)
    wait_for_step(process, run_dir, 12)
    rank_1 = workers(process)[1]
    os.kill(rank_1, signal.SIGKILL)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 1
    (line,) = errors(err)
    assert f"rank 1 (process {rank_1}) was killed by SIGKILL" in line
    assert "--resume" in line
    assert "Traceback" not in err
    assert_whole(run_dir)

    for ranks in (("--set", "launcher.processes=1"), TWO):
        done = steps_so_far(run_dir)
        process = preloaded.start(*arguments, *ranks)
        wait_for_step(process, run_dir, done + 3)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=400)
        assert process.returncode == 143
        assert not errors(err), err
        assert f"to resume: wmtp run --resume {run_dir}" in err
        assert max(int(path.name[5:]) for path in assert_whole(run_dir)) == steps_so_far(run_dir)

    found = curve(run_dir)
    compared = min(len(found), len(expected))
    assert compared > 15
    assert any("source_loss/text" in step for step in expected)
    for left, right in zip(found[:compared], expected[:compared], strict=True):
        assert left["step"] == right["step"]
        for name in right.keys() - {"tokens_per_second", "peak_memory_gib", "stage"}:
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), (left["step"], name)


LAUNCHER = """
import json, os, subprocess, sys, time
with open("job.json", "w") as file:
    json.dump({"run_dir": None, "resume": False, "parent": os.getpid(), "verbose": False}, file)
worker = subprocess.Popen([sys.executable, "-m", "wmtp.launchers.worker", "."], stdout=subprocess.DEVNULL)
print(worker.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_rank_that_is_starting_ends_with_its_launcher(recipe, tmp_path):
    """A launcher that is killed tells nobody, and its store is gone too."""
    (tmp_path / "config.toml").write_text(recipe.read_text() + "\n[launcher]\nprocesses = 2\n")
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    env = os.environ | place | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        rank = Path("/proc") / launcher.stdout.readline().strip()
        launcher.kill()
    deadline = time.monotonic() + 60
    while rank.exists() and " Z " not in (rank / "stat").read_text():
        assert time.monotonic() < deadline, "it waits for others that will never come"
        time.sleep(0.05)


def test_ranks_with_another_config_are_named(recipe, preloaded, tmp_path):
    variables = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        preloaded.start("run", recipe, "--set", f"optimizer.lr={lr}", env=variables | {"RANK": rank, "LOCAL_RANK": rank})
        for rank, lr in (("0", "0.001"), ("1", "0.002"))
    ]
    (_, said), (_, silent) = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert any("rank 1" in line and "optimizer.lr: 0.002 in place of 0.001" in line for line in errors(said)), said
    assert not errors(silent), "said once"
    assert not list((tmp_path / "runs").glob("*/config.toml"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["launcher.processes=0"], ["launcher.processes", "1 to 1024"]),
        (["launcher.processes=2", 'devices.device="cuda"'], ["devices.device", "no cuda"]),
        (["launcher.processes=2", 'devices.device="mps"'], ["launcher.processes", "mps"]),
        (['devices.fsdp.strategy="half"'], ["devices.fsdp.strategy", "grad-op"]),
        (
            ['devices.activation_checkpointing="offload"', 'devices.device="cpu"'],
            ["devices.activation_checkpointing", 'write "full"'],
        ),
        (["launcher.processes=1", 'devices.fsdp.strategy="hybrid"'], ["devices.fsdp.strategy", "launcher.processes = 1"]),
        (["devices.timeout=0"], ["devices.timeout"]),
    ],
)
def test_mistakes_end_before_any_process_is_started(recipe, wmtp, tmp_path, overrides, words):
    run = wmtp("run", recipe, "--run-name", "x", *(part for override in overrides for part in ("--set", override)))
    assert run.returncode == 2, run.stderr
    assert any(all(word in line for word in words) for line in errors(run.stderr)), run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "runs/x").exists()


def test_decoding_is_measured_by_one_of_several_processes(recipe, wmtp, preloaded, tmp_path):
    """At the end of a run, where each has the whole model, and by torchrun: what one process measures, written once."""
    evaluation = ("--set", 'eval=[{type="speculative", prompts=3, max_new_tokens=8}, {type="perplexity"}]')
    run_dir = tmp_path / "runs/x"
    run = wmtp(
        "run",
        recipe,
        "--run-name",
        "x",
        *TWO,
        "--set",
        'devices.fsdp.strategy="none"',
        "--set",
        "train.max_steps=6",
        *evaluation,
    )
    assert run.returncode == 0, run.stderr
    assert not [line for line in run.stderr.splitlines() if line.startswith("warning") and "max_length" not in line]
    of_run = json.loads((run_dir / "evaluation.json").read_text())

    arguments = ["eval", run_dir, "--json", "--output", tmp_path / "two"]
    two = preloaded.run("--standalone", "--nproc-per-node=2", "-m", "wmtp", *arguments, code=TORCHRUN)
    assert two.returncode == 0, two.stderr
    answer = json.loads(two.stdout)  # one object, not one of each process
    of_eval = json.loads((tmp_path / "two/evaluation.json").read_text())
    assert answer["metrics"] == of_eval
    assert "rank 0 does, and the other 1 end" in two.stderr
    timed = {"speculative/speedup", "speculative/speedup_over_transformers"}
    assert of_eval.keys() == of_run.keys() > timed
    for name in of_eval.keys() - timed:
        assert of_eval[name] == pytest.approx(of_run[name], rel=1e-4), name


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_model_divided_by_one_learns_as_one_that_is_whole(recipe, wmtp, tmp_path, precision):
    settings = (
        "--set",
        "train.max_steps=6",
        "--set",
        f"devices.precision={precision}",
        "--set",
        "data.train.micro_batch_size=1",
    )
    for name, extra in (("whole", ()), ("divided", ("--set", 'devices.fsdp.strategy="grad-op"'))):
        run = wmtp("run", recipe, "--run-name", name, *settings, *extra)
        assert run.returncode == 0, run.stderr
    for left, right in zip(curve(tmp_path / "runs/divided"), curve(tmp_path / "runs/whole"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-6 if precision == "fp32" else 1e-3)


@pytest.mark.slow
def test_layers_that_were_frozen_at_first_learn_from_their_stage_on(recipe, wmtp, tmp_path):
    """They are gathered by an evaluation when the stage begins; and torch 2.11 gives a layer that is frozen no precision."""
    settings = ["train.max_steps=6", "models.base.heads.warmup_steps=3", "train.eval_interval=3"]
    for precision, bound in (("fp32", 1e-4), ("bf16-params", 1e-3)):
        for name, own in (("one", []), ("full", [TWO[1]]), ("grad-op", [TWO[1], 'devices.fsdp.strategy="grad-op"'])):
            changes = [part for setting in [*settings, f"devices.precision={precision}", *own] for part in ("--set", setting)]
            run = wmtp("run", recipe, "--run-name", f"{name}-{precision}", *changes)
            assert run.returncode == 0, run.stderr
        one = curve(tmp_path / f"runs/one-{precision}")
        for name in ("full", "grad-op"):
            for left, right in zip(curve(tmp_path / f"runs/{name}-{precision}"), one, strict=True):
                assert left["loss"] == pytest.approx(right["loss"], rel=bound), name


@pytest.mark.slow
def test_processes_multiply_in_fp8_as_one_does_and_their_checkpoint_fits(recipe, wmtp, tmp_path):
    """Each process scales activations by its own rows, so losses are near, not equal."""
    pytest.importorskip("torchao")
    fp8 = 'devices={device="cpu", precision="fp8", fp8={emulate=true, min_features=16}'
    for name, devices, own in (
        ("one", fp8 + "}", ()),
        ("divided", fp8 + ', fsdp={strategy="grad-op"}}', ()),
        ("full", fp8 + "}", TWO),
        ("none", fp8 + ', fsdp={strategy="none"}}', TWO),
    ):
        run = wmtp("run", recipe, "--run-name", name, *own, "--set", "train.max_steps=6", "--set", devices)
        assert run.returncode == 0, run.stderr
        assert "fp8: " in run.stderr
    one = [line["loss"] for line in curve(tmp_path / "runs/one")]
    for name, bound in (("divided", 1e-3), ("full", 1e-2), ("none", 1e-2)):
        assert [line["loss"] for line in curve(tmp_path / f"runs/{name}")] == pytest.approx(one, rel=bound), name
    resumed = wmtp(
        "run",
        recipe,
        "--run-name",
        "more",
        *TWO,
        "--set",
        "train.max_steps=6",
        "--set",
        fp8 + "}",
        "--set",
        "checkpoints.save_interval=3",
        "--set",
        "checkpoints.keep_last=0",
    )
    assert resumed.returncode == 0, resumed.stderr
    before = curve(tmp_path / "runs/more")
    shutil.rmtree(tmp_path / "runs/more/checkpoints/step-6")
    again = wmtp("run", "--resume", tmp_path / "runs/more")
    assert again.returncode == 0, again.stderr
    assert [line["loss"] for line in curve(tmp_path / "runs/more")] == [line["loss"] for line in before]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_rank_that_hangs_is_named_and_ends_the_others(recipe, preloaded, tmp_path):
    process = preloaded.start(
        "run", recipe, "--run-name", "x", *TWO, "--set", "train.max_steps=2000", "--set", "devices.timeout=4"
    )
    wait_for_step(process, tmp_path / "runs/x", 6)
    rank_1 = workers(process)[1]
    os.kill(rank_1, signal.SIGSTOP)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 1
    (line,) = errors(err)
    assert "rank 1 (" in line
    assert f"process {rank_1}" in line
    assert "step-5" in line
    assert not Path(f"/proc/{rank_1}").exists()
    assert assert_whole(tmp_path / "runs/x")

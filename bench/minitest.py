"""Mini-test of configs/vessl-minitest.toml on this machine.

VESSL alone is replaced.

    python bench/minitest.py [FOLDER] [--keep-runs] [--gpus N]

Models and data are put on a real S3 server on 127.0.0.1. What ``wmtp launch`` would send is planned from the config, and its
one line is run as VESSL would: by sh, in a new folder, with the plan's variables alone. Two processes train under FSDP2 by
gloo; with ``--gpus``, one a GPU by NCCL, in the config's own precision. The first container is killed (SIGKILL) in the middle
of the run; a second one, with an empty folder again, goes on from the checkpoint on S3. Then the tracker's database, the
checkpoints and the model are looked at.

``--keep-runs`` gives the second container the run directory of the first, as a mounted volume does, with checkpoints there
instead of on S3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
WMTP = Path(shutil.which("wmtp", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "wmtp")
STEPS = 10

MODEL = """
[run]
output_dir = "{folder}"
name = "{name}"
[models.base]
type = "scratch"
architecture = "gpt2"
vocab_size = 258
hidden_size = 256
layers = 4
attention_heads = 4
max_positions = 512
[models.base.heads]
horizon = {horizon}
{kind}
[tokenizer]
type = "bytes"
[datasets.stdlib]
type = "python-source"
max_length = 300
[data.train]
max_length = 256
batch_size = 2
[trainer]
type = "baseline-mtp"
[train]
max_steps = 2
[checkpoints]
save_final = false
[tracker]
type = "jsonl"
"""


def main() -> None:
    """Prepare, plan, run, kill, run again, look."""
    from wmtp_storage.testing import start_s3_server

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", help="where everything is written; default: a temporary folder")
    parser.add_argument("--keep-runs", action="store_true", help="the second container has the first one's run directory")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="one process a GPU by NCCL; default: two on the CPU")
    arguments = parser.parse_args()
    keep_runs = arguments.keep_runs
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="wmtp-minitest-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    server = start_s3_server()
    bucket = server.bucket()
    prepare(folder, bucket, server.environment)
    began = time.monotonic()
    spec = plan(bucket, keep_runs=keep_runs, gpus=arguments.gpus)
    secrets = {name: server.environment[name] for name, value in spec["env"].items() if isinstance(value, dict)}
    plain = {name: value for name, value in spec["env"].items() if isinstance(value, str)}
    # what a machine of VESSL has, and what says where S3 is
    machine = {"PATH": f"{Path(sys.executable).parent}:{WMTP.parent}:/usr/bin:/bin"}
    machine |= {name: value for name, value in os.environ.items() if name.startswith(("PYTHONPATH", "NCCL_", "LD_LIBRARY"))}
    if not arguments.gpus:
        machine["CUDA_VISIBLE_DEVICES"] = ""
    machine |= {name: value for name, value in server.environment.items() if name not in secrets}
    environment = machine | plain | secrets

    first = container(folder / "first")
    killed_at = run_and_kill(spec, first, environment)
    say(began, f"the first container was killed after step {killed_at}")
    second = container(folder / "second")
    if keep_runs:
        shutil.copytree(first / "runs", second / "runs", dirs_exist_ok=True)
    done = subprocess.run(command(spec), cwd=second, env=environment | {"HOME": str(second)}, capture_output=True, text=True)
    (second / "log").write_text(done.stderr)
    check(done.returncode == 0, f"the second container ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    say(began, "the second container came to its end")
    look(second, server, bucket, keep_runs=keep_runs)
    say(began, f"all is well, in {folder}")


def prepare(folder: Path, bucket: str, environment: dict[str, str]) -> None:
    """Two small models and ten samples, on S3."""
    os.environ |= environment
    for name, horizon, kind in (("distilgpt2-mtp", 4, 'kind = "linear"'), ("distilgpt2", 1, "")):
        recipe = folder / f"{name}.toml"
        recipe.write_text(MODEL.format(folder=folder / "models", name=name, horizon=horizon, kind=kind))
        shutil.rmtree(folder / "models" / name, ignore_errors=True)
        wmtp("run", recipe)
        wmtp("push", folder / "models" / name / "model", f"s3://{bucket}/models/{name}")
    lines = [{"prompt": f"def f{i}(x):\n", "completion": f"    return x + {i}\n" * (i + 1)} for i in range(10)]
    (folder / "minitest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wmtp("push", folder / "minitest.jsonl", f"s3://{bucket}/datasets/minitest.jsonl")


def plan(bucket: str, *, keep_runs: bool, gpus: int) -> dict:
    """Run YAML of the mini-test, for this machine and bucket."""
    here = {
        "models.base.uri": f"s3://{bucket}/models/distilgpt2-mtp",
        "models.ref.uri": f"s3://{bucket}/models/distilgpt2",
        "datasets.minitest.uri": f"s3://{bucket}/datasets/minitest.jsonl",
        "checkpoints.uri": f"s3://{bucket}/checkpoints/minitest",
        "tracker.tracking_uri": f"s3://{bucket}/mlruns",
        "launcher.gpus": str(gpus),
        "launcher.processes": str(gpus or 2),
        "devices.precision": "bf16" if gpus else "fp32",
    }
    config = (ROOT / "configs" / "vessl-minitest.toml").read_text()
    if keep_runs:
        del here["checkpoints.uri"]
        config = "\n".join(line for line in config.splitlines() if not line.startswith('uri = "s3://wmtp/checkpoints'))
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(config)
        file.flush()
        sets = [word for key, value in here.items() for word in ("--set", f"{key}={value}")]
        return yaml.safe_load(wmtp("launch", "--on", "vessl", "--dry-run", file.name, *sets))


def container(folder: Path) -> Path:
    """A working folder as the image has it."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("models", "datasets", "checkpoints", "mlruns", "logs", "runs", "cache"):
        (folder / name).mkdir(parents=True)
    return folder


def command(spec: dict) -> list[str]:
    """Command by which VESSL starts the run."""
    (step,) = spec["run"]
    return ["sh", "-c", step["command"]]


def run_and_kill(spec: dict, folder: Path, environment: dict[str, str]) -> int:
    """Start the run, and take its machine away after a checkpoint.

    The run is not at its end then.
    """
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command(spec), cwd=folder, env=environment | {"HOME": str(folder)}, stdout=log, stderr=log, start_new_session=True
        )
        metrics = folder / "runs" / "minitest" / "metrics.jsonl"
        steps = 0
        while process.poll() is None and steps <= STEPS // 2:
            time.sleep(0.02)
            steps = metrics.read_text().count("\n") if metrics.exists() else 0
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    check(process.returncode == -signal.SIGKILL, f"it ended by itself:\n{(folder / 'log').read_text()}")
    for line in subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines():
        check(str(folder) not in line, f"a process outlived the container: {line}")
    return steps


def look(folder: Path, server, bucket: str, *, keep_runs: bool) -> None:  # noqa: ANN001
    """Check that everything is there."""
    run = folder / "runs" / "minitest"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    print(f"{rows[-1].get('device', '')} {[round(row['loss'], 4) for row in rows if 'loss' in row]}")
    check(steps[-1] == STEPS, f"the last step is {steps[-1]}")
    check("resuming" in (folder / "log").read_text() or min(steps) > 1, "it began anew")
    check((run / "model" / "config.json").is_file(), "there is no model")
    wmtp("runs", "pull", f"s3://{bucket}/mlruns", "--into", folder / "pulled" / "mlflow.db")
    with sqlite3.connect(folder / "pulled" / "mlflow.db") as database:
        logged = database.execute("select run_uuid, step from metrics where key = 'loss' order by step").fetchall()
    check([step for _, step in logged] == list(range(1, STEPS + 1)), f"MLflow has the losses of {logged}")
    check(len({run for run, _ in logged}) == 1, f"MLflow has more than one run: {logged}")
    print(f"steps {steps}; {len(logged)} losses in one MLflow run, pulled from S3")
    if not keep_runs:
        keys = [entry["Key"] for entry in server.client().list_objects_v2(Bucket=bucket, Prefix="checkpoints/")["Contents"]]
        check(any("step-" in key for key in keys), f"no checkpoint on S3: {keys}")
        print(f"{len(keys)} objects of checkpoints on S3")


def wmtp(*arguments: str | Path) -> str:
    """Run a command; its standard output."""
    words = [str(WMTP), *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    check(done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def check(condition: bool, message: str) -> None:
    """Stop with ``message`` unless ``condition`` holds."""
    if not condition:
        sys.exit(f"minitest: {message}")


def say(began: float, text: str) -> None:
    """A line with the seconds since the plan was made."""
    print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)


if __name__ == "__main__":
    main()

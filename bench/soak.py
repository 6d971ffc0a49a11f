"""Long run of a small model under a memory limit.

``python bench/soak.py [--minutes 60] [--out FILE]``

One ``wmtp run`` with checkpoints, evaluations, report records and a real MLflow server that is away for a fifth of the time.
Each second its memory, open files, threads and steps are read from the kernel. After the first fifth the memory that it may
allocate (RLIMIT_DATA) is set to what it has then and ``--headroom`` MB: a leak ends it. At its end it gets a SIGTERM.

What must hold, else the exit code is 1: open files and threads of the last fifth are those of the second, and so is memory,
compared from minute 20 on: before, allocators still meet their largest demand; every step is in ``metrics.jsonl`` once;
MLflow has every point, also those of the time when it was away; two checkpoints are left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

RECIPE = """
[run]
name = "soak"
output_dir = "{folder}/runs"
[models.base]
type = "scratch"
vocab_size = 258
max_positions = 256
hidden_size = 64
layers = 2
attention_heads = 2
intermediate_size = 128
[models.base.heads]
horizon = 4
[tokenizer]
type = "bytes"
[datasets.stdlib]
type = "python-source"
max_length = 256
max_functions = 2000
[data.train]
max_length = 256
batch_size = 4
[data.eval]
holdout = 0.02
max_batches = 2
[trainer]
type = "focal"
[train]
max_steps = 100000000
eval_interval = {interval}
[checkpoints]
save_interval = {interval}
best = "eval/loss"
[report]
samples = 4
sample_interval = 50
weight_interval = 10
[devices]
device = "cpu"
[tracker]
type = "mlflow"
tracking_uri = "{uri}"
"""
SETTLED = 20 * 60.0  # seconds: a first retry, evaluation and thread beside others each raise what the C library keeps
GROWTH = 16 * 2**20  # bytes that the medians of two stretches may differ by


@frozen
class Sample:
    """State of the run at a moment.

    Args:
        second: since the first step.
        memory: bytes of memory of its own: VmRSS without mapped files.
        data: bytes that RLIMIT_DATA counts.
        files: open files.
        threads: their number.
    """

    second: float
    memory: int
    data: int
    files: int
    threads: int


def main() -> int:
    """Run, sample and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--headroom", type=int, default=128, metavar="MB")
    parser.add_argument("--interval", type=int, default=200, help="steps between checkpoints, and between evaluations")
    parser.add_argument("--out", type=Path, help="a file for all samples, as JSON lines")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="wmtp-soak-"))
    server = Server(folder)
    run = None
    try:
        server.start()
        server.wait()
        recipe = folder / "soak.toml"
        recipe.write_text(RECIPE.format(folder=folder, interval=arguments.interval, uri=server.uri))
        with (folder / "log").open("wb") as log:
            environment = {**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}  # both share a machine, which may be busy
            run = subprocess.Popen([sys.executable, "-m", "wmtp", "run", str(recipe)], stdout=log, stderr=log, env=environment)
        samples, limit = watch(run, server, folder / "runs/soak", arguments.minutes * 60, arguments.headroom * 2**20)
        server.wait()
        run.send_signal(signal.SIGTERM)
        code = run.wait(300)
        if arguments.out is not None:
            arguments.out.write_text(
                "".join(json.dumps([s.second, s.memory, s.data, s.files, s.threads]) + "\n" for s in samples)
            )
        problems = judge(samples, folder, server.uri, code)
        print(f"limit of allocated memory: {limit / 2**20:.0f} MB")
        print("\n".join(problems) or "nothing grew, nothing was lost")
        if problems:
            print((folder / "log").read_text()[-2000:])
        return 1 if problems else 0
    finally:
        if run is not None and run.poll() is None:
            run.kill()
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


class Server:
    """Real ``mlflow server`` that returns with its address and database."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._folder, self._port = folder, port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/m.db", "--artifacts-destination", str(self._folder / "a")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def wait(self) -> None:
        """Wait until it answers, which takes a busy machine a minute."""
        for _ in range(3000):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.1)
        raise RuntimeError((self._folder / "mlflow.log").read_text())

    def kill(self) -> None:
        """End it with all of its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def watch(
    run: subprocess.Popen[bytes], server: Server, run_dir: Path, seconds: float, headroom: int
) -> tuple[list[Sample], int]:
    """Sample the run until its time is over.

    MLflow is away from two to three fifths of it.
    """
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").stat().st_size:
        if run.poll() is not None:
            raise RuntimeError((run_dir.parent.parent / "log").read_text())
        time.sleep(0.2)
    began, samples, limit, away, said = time.monotonic(), list[Sample](), 0, None, -1
    while (now := time.monotonic() - began) < seconds and run.poll() is None:
        samples.append(sample(run.pid, now))
        if not limit and now > seconds / 5:
            limit = samples[-1].data + headroom
            resource.prlimit(run.pid, resource.RLIMIT_DATA, (limit, limit))
        if away is None and now > 2 * seconds / 5:
            server.kill()
            away = True
        if away and now > 3 * seconds / 5:
            server.start()
            away = False
        if int(now / 60) > said:
            said = int(now / 60)
            last = samples[-1]
            print(
                f"{now / 60:5.1f} min: {steps(run_dir)[-1]} steps, {last.memory / 2**20:.0f} MB, {last.files} files open,"
                f" {last.threads} threads{', MLflow is away' if away else ''}",
                flush=True,
            )
        time.sleep(1)
    return samples, limit


def sample(pid: int, second: float) -> Sample:
    """Read what the kernel says of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kilobytes = {name: int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmData")}
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(second, kilobytes["RssAnon"], kilobytes["VmData"], files, int(status["Threads"]))


def steps(run_dir: Path) -> list[int]:
    """List the steps of ``metrics.jsonl``.

    A last line that is being written is left out.
    """
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [record["step"] for line in lines if "loss" in (record := json.loads(line))]


def judge(samples: Sequence[Sample], folder: Path, uri: str, code: int) -> list[str]:
    """Compare the second fifth of the time with the last.

    And what was recorded with what happened.
    """
    from mlflow import MlflowClient

    run_dir, end = folder / "runs/soak", samples[-1].second
    second = [each for each in samples if end / 5 <= each.second < 2 * end / 5]
    settled = [each for each in samples if max(SETTLED, end / 5) <= each.second < max(SETTLED, end / 5) + end / 5]
    is_long = end >= 2 * SETTLED
    late = [each for each in samples if each.second >= 4 * end / 5]
    problems = [] if code == 128 + signal.SIGTERM else [f"the run ended with {code}"]
    for name, unit in (("memory", 2**20), ("data", 2**20), ("files", 1), ("threads", 1)):
        early = settled if unit > 1 and is_long else second
        before, after = (statistics.median(getattr(each, name) for each in some) for some in (early, late))
        highest = max(getattr(each, name) for each in samples)
        print(f"{name}: {before / unit:.0f} → {after / unit:.0f}, at most {highest / unit:.0f}{' MB' if unit > 1 else ''}")
        if unit > 1 and not is_long:
            print(f"{name} is not judged in less than {2 * SETTLED / 60:.0f} minutes")
        elif after - before > (GROWTH if unit > 1 else 0):
            problems.append(f"{name} grew from {before / unit:.0f} to {after / unit:.0f}")
    logged = steps(run_dir)
    if logged != list(range(1, len(logged) + 1)):
        problems.append("metrics.jsonl lacks steps, or has some twice")
    identity = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    tracked = [point.step for point in MlflowClient(uri).get_metric_history(identity, "loss")]
    if sorted(tracked) != logged:
        problems.append(f"MLflow has {len(tracked)} of {len(logged)} points of the loss")
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step-"))
    if len(saved) not in (2, 3):  # the last two, and the best
        problems.append(f"checkpoints: {', '.join(saved)}")
    records = sum(1 for path in run_dir.glob("*.jsonl") for _ in path.open())
    print(
        f"{len(logged)} steps, {len(tracked)} points of each metric in MLflow, {logged[-1] // int(steps_between(run_dir))}"
        f" checkpoints and as many evaluations, {records} lines of records"
    )
    return problems


def steps_between(run_dir: Path) -> int:
    """Read the interval of checkpoints from the run's config."""
    import tomllib

    return tomllib.loads((run_dir / "config.toml").read_text())["checkpoints"]["save_interval"]


if __name__ == "__main__":
    sys.exit(main())

"""A whole ``wmtp run`` on packed text beside ``bench/step.py``.

With the same rows, on one GPU, by one command.

    python bench/run.py --shape 1b --batch 8
    python bench/run.py --shape smollm2 --batch 32

The command runs twice: with an empty cache of compiled code and tokens, and again. Then the steps of the bench alone, random
tokens in memory: one document a row, and the documents of the run, since attention over short ones takes less time. Positions a
second count every place of a row, as the bench does; tokens a second those that hold text. The split is of the command's wall
time: each part is the time of the process inside of it, and ``step`` holds the waits for the device. Reports are recorded as
often as in a run of 5,000 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multi_gpu_runs import tokenizer, toml

SHAPES = {
    "tiny": {
        "vocab_size": 1024, "hidden_size": 64, "layers": 2, "attention_heads": 4, "kv_heads": 2, "intermediate_size": 128,
        "max_positions": 256,
    },
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "layers": 30, "attention_heads": 9, "kv_heads": 3, "intermediate_size": 1536,
        "max_positions": 1024,
    },
    "1b": {
        "vocab_size": 32000, "hidden_size": 2048, "layers": 16, "attention_heads": 32, "kv_heads": 8, "intermediate_size": 8192,
        "max_positions": 2048,
    },
}  # fmt: skip
#: steps before the ones that are timed
WARMUP = 8
#: names of the parts that the child's clock reports, in the order of the table
PARTS = ("start", "data", "step", "logging", "evaluation", "saving", "rest")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="timed ones")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="keeps what is made; default: one that is removed")
    parser.add_argument("--skip-bench", action="store_true", help="the command alone")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        inside(given.inside)
        return
    with tempfile.TemporaryDirectory(prefix="wmtp-run-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = write_recipe(given, folder)
        found = {name: command(recipe, folder, name) for name in ("cold", "warm")}
        bench = {} if given.skip_bench or given.device != "cuda" else bench_alone(given, folder, found["warm"]["layouts"])
        for name in found:
            show(name, found[name], given, bench)


def bench_alone(given: argparse.Namespace, folder: Path, layouts: list[list[list[int]]]) -> dict[str, float]:
    """Positions a second of ``bench/step.py``.

    With one document a row, and with the run's documents, step by step.
    """
    shape, file, layout = SHAPES[given.shape], folder / "step.json", folder / "layout.json"
    layout.write_text(json.dumps(layouts))
    options = {
        "vocab": shape["vocab_size"], "hidden": shape["hidden_size"], "layers": shape["layers"],
        "ffn": shape["intermediate_size"], "attention-heads": shape["attention_heads"], "kv-heads": shape["kv_heads"],
        "length": shape["max_positions"], "batch": given.batch, "layout": layout, "warmup": 8, "steps": 24,
    }  # fmt: skip
    script = [sys.executable, str(Path(__file__).with_name("step.py")), "--rows", "ours", "ours-layout", "--json", str(file)]
    subprocess.run([*script, *(f"--{name}={value}" for name, value in options.items())], check=True)
    rows = json.loads(file.read_text())
    return {row["row"]: row["tokens_per_second"] for row in rows if "failed" not in row}


def write_recipe(given: argparse.Namespace, folder: Path) -> Path:
    """Write the config.

    `bf16-params` and compiled on a GPU, evaluation and a saved model at the end.
    """
    shape = SHAPES[given.shape]
    recipe = folder / "run.toml"
    config: dict[str, object] = {
        "run": {"output_dir": str(folder / "runs")},
        "storage": {"cache_dir": str(folder / "cache")},
        "models": {"base": {"type": "scratch", **shape, "heads": {"horizon": 4}}},
        "tokenizer": {"type": "hf-transformers", "uri": str(tokenizer(folder, shape["vocab_size"]))},
        "datasets": {
            "text": {"type": "jsonl", "uri": str(text(folder, "text.jsonl", 0))},
            "held-out": {"type": "jsonl", "uri": str(text(folder, "held-out.jsonl", 1))},
        },
        "data": {
            "train": {
                "sources": ["text"], "max_length": shape["max_positions"], "batch_size": given.batch, "overlong": "split",
                "learn_prompt": True,
            },
            "eval": {"sources": ["held-out"], "max_batches": 8},
        },
        "trainer": {"type": "baseline-mtp"},
        "optimizer": {"type": "adamw", "lr": 3e-4},
        "train": {"max_steps": WARMUP + given.steps},
        "devices": {"device": given.device, "precision": "bf16-params", "compile": given.device == "cuda"},
        "checkpoints": {"save_final": shape["hidden_size"] < 1000},  # gigabytes take a slow disk longer than all else
        "report": {"weight_interval": 25, "sample_interval": 313},
        "tracker": {"type": "jsonl"},
    }  # fmt: skip
    recipe.write_text(toml(config))
    return recipe


def text(folder: Path, name: str, part: int) -> Path:
    """Standard library's modules, whole: one in twenty is held out."""
    file = folder / name
    sources = sorted(Path(os.__file__).parent.rglob("*.py"))[:700]
    with file.open("w") as out:
        for number, source in enumerate(sources):
            code = source.read_text(errors="replace")
            if (number % 20 == 0) == bool(part) and len(code) > 200:
                out.write(json.dumps({"id": f"{number}-{source.name}", "prompt": "", "completion": code}) + "\n")
    return file


def command(recipe: Path, folder: Path, name: str) -> dict[str, Any]:
    """Run the command in its own process; return its clock's counts."""
    compiled, log = folder / "compiled", folder / f"{name}.log"
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "BENCH_BEGAN": str(time.time()),
        "BENCH_RUN": f"{name}-{os.getpid()}",
    }
    with log.open("w") as out:
        script = [sys.executable, __file__, "--inside", str(recipe)]
        ended = subprocess.run(script, env=environment, stdout=subprocess.PIPE, stderr=out, text=True)
    if ended.returncode:
        sys.exit(log.read_text()[-4000:])
    return json.loads(ended.stdout.splitlines()[-1])


def show(name: str, found: dict[str, Any], given: argparse.Namespace, bench: dict[str, float]) -> None:
    """Print one run."""
    times, tokens = found["times"], found["tokens"]
    steps = len(times) - WARMUP
    seconds = times[-1] - times[WARMUP - 1]
    places = given.batch * SHAPES[given.shape]["max_positions"] * steps / seconds
    real = sum(tokens[WARMUP:]) / seconds
    ratio = "".join(f", {places / alone:.3f} x {row} ({alone:,.0f})" for row, alone in bench.items())
    documents = sum(found["documents"][WARMUP:]) / (steps * given.batch)
    print(f"\nwmtp run, {name} cache: {places:,.0f} positions/s{ratio}")
    print(f"  {real:,.0f} tokens/s: rows are {real / places:.1%} full, of {documents:.1f} documents each")
    print(f"  first step after {found['first']:.1f} s; the command took {found['wall']:.1f} s:")
    for part in PARTS:
        print(f"  {part:<12}{found['parts'][part]:8.2f} s {found['parts'][part] / found['wall']:7.1%}")
    print(
        "  a timed step's host time: " + ", ".join(f"{k} {1e3 * v / steps:.1f} ms" for k, v in found["steady"].items()),
        flush=True,
    )


class Clock:
    """Wall time by part, without that of the parts inside."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.steady: dict[str, float] = {}
        self._open: list[str] = []
        self._last = time.time()

    def switch(self) -> None:
        now = time.time()
        self.parts[self._open[-1] if self._open else "rest"] += now - self._last
        self._last = now

    def timed(self, owner: Any, name: str, part: str) -> None:
        """Count a function's time as ``part``."""
        plain: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._open.append(part)
            try:
                return plain(*args, **kwargs)
            finally:
                self.switch()
                self._open.pop()

        setattr(owner, name, counted)


def inside(recipe: Path) -> None:
    """Run the command with a clock at its parts; print its counts."""
    began = float(os.environ["BENCH_BEGAN"])
    from wmtp.training import loop, run, stages, telemetry

    clock = Clock()
    clock.timed(stages.StageBatches, "step", "data")
    clock.timed(loop.Fit, "_optimizer_step", "step")
    clock.timed(telemetry.PendingStep, "read", "step")
    clock.timed(telemetry.StepLog, "write", "logging")
    clock.timed(telemetry.Recorder, "write", "logging")
    clock.timed(telemetry.Recorder, "recording", "logging")
    clock.timed(loop, "evaluate", "evaluation")
    clock.timed(run, "measure_model", "evaluation")
    clock.timed(run, "show_sample", "evaluation")
    clock.timed(loop.Fit, "_save", "saving")
    clock.timed(run, "write_folder", "saving")
    times: list[float] = []
    documents: list[int] = []
    layouts: list[list[list[int]]] = []
    plain_step, at_warmup = loop.Fit._optimizer_step, {}

    plain_read = telemetry.PendingStep.read

    def read(pending: telemetry.PendingStep, *args: Any) -> dict[str, float | str]:
        documents.append(len(pending.batch.documents))
        layouts.append([row.unique_consecutive(return_counts=True)[1].tolist() for row in pending.batch.document])
        return plain_read(pending, *args)

    def step(fit: loop.Fit) -> None:
        if not times:
            clock.switch()
            clock.parts["start"] = time.time() - began
            clock.parts["rest"] = 0.0
        plain_step(fit)
        times.append(time.time())
        if len(times) == WARMUP:
            at_warmup.update(clock.parts)
        if len(times) == fit.total_steps:
            clock.steady.update({k: clock.parts[k] - at_warmup[k] for k in ("data", "step", "logging")})

    loop.Fit._optimizer_step = step  # type: ignore[method-assign]
    telemetry.PendingStep.read = read  # type: ignore[method-assign]
    name = os.environ["BENCH_RUN"]
    from wmtp.cli import main as wmtp

    standard, sys.stdout = sys.stdout, sys.stderr
    code = wmtp(["run", str(recipe), "--run-name", name])
    sys.stdout = standard
    if code:
        sys.exit(code)
    clock.switch()
    lines = (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    print(
        json.dumps(
            {
                "wall": time.time() - began, "first": times[0] - began, "times": times, "parts": clock.parts,
                "steady": clock.steady, "tokens": [record["tokens"] for record in records], "documents": documents,
                "layouts": layouts[WARMUP:],
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()

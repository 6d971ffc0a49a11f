"""Time from command to first step, beside importing transformers.

``python bench/start.py [--device cuda]``

Each line is a process of its own: the bare import, then ``wmtp run`` of three steps with tokens that are cached, by each
tracker. ``first step`` is when metrics.jsonl has its first line; the table says how much that is beyond the bare import.
Files that were not read since the machine started come from its disk: the first line says what that costs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "small": "hidden_size = 128\nlayers = 4\nattention_heads = 4\nintermediate_size = 512",
    "smollm2": "hidden_size = 576\nlayers = 30\nattention_heads = 9\nkv_heads = 3\nintermediate_size = 1536",
}
RECIPE = """
[run]
output_dir = "{folder}/runs"
[models.base]
type = "scratch"
vocab_size = 320
max_positions = 1024
{shape}
[models.base.heads]
horizon = 4
[tokenizer]
type = "bytes"
[datasets.stdlib]
type = "python-source"
max_functions = 200
[data.train]
max_length = 512
batch_size = 4
[trainer]
type = "baseline-mtp"
[train]
max_steps = 3
[checkpoints]
save_final = false
[report]
samples = 0
[devices]
device = "{device}"
[tracker]
type = "{tracker}"
"""
IMPORT = "from transformers import LlamaForCausalLM"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="small", choices=SHAPES)
    arguments = parser.parse_args()
    print(f"{'bare import, first time on this machine perhaps':<48} {imported():6.1f} s", flush=True)
    bare = min(imported() for _ in range(2))
    print(f"{'bare import':<48} {bare:6.1f} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="wmtp-start-") as folder:
        recipe = Path(folder) / "recipe.toml"
        for name, tracker in (("tokens are made", "jsonl"), ("tokens are cached", "jsonl"), ("the same, MLflow", "mlflow")):
            recipe.write_text(
                RECIPE.format(folder=folder, shape=SHAPES[arguments.shape], device=arguments.device, tracker=tracker)
            )
            first, whole = run(recipe, name.replace(" ", "-").replace(",", ""))
            print(
                f"{'wmtp run, ' + name:<48} {first:6.1f} s to the first step, {first - bare:5.1f} beyond the bare import; "
                f"{whole:6.1f} s in all",
                flush=True,
            )


def imported() -> float:
    """Seconds of a process that only imports one model class."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORT], check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def run(recipe: Path, name: str) -> tuple[float, float]:
    """Seconds to the first step, and to the end."""
    began = time.monotonic()
    log = recipe.with_suffix(".log")
    command = [sys.executable, "-m", "wmtp", "run", str(recipe), "--run-name", name]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        metrics = recipe.parent / "runs" / name / "metrics.jsonl"
        first = 0.0
        while process.poll() is None:
            if not first and metrics.exists() and metrics.stat().st_size:
                first = time.monotonic() - began
            time.sleep(0.02)
    if process.returncode:
        sys.exit(log.read_text())
    return first or time.monotonic() - began, time.monotonic() - began


if __name__ == "__main__":
    main()

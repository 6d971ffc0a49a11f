"""Last steps of runs in fp8, again in bf16.

    wmtp study bench/fp8-quality.toml --arms tensorwise,bf16
    python bench/fp8_then_bf16.py studies/fp8-quality/runs/tensorwise-seed*

Each run directory is copied to ``NAME-then-bf16`` with its last checkpoint, and resumed with ``devices.precision =
"bf16-params"``. A line has the losses of the last evaluation of both.
"""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from pathlib import Path

import wmtp


def losses(run_dir: Path) -> dict[str, float]:
    """Return the losses of the last evaluation."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {key: round(value, 6) for line in lines for key, value in line.items() if key.startswith("eval/loss")}


def then_bf16(run_dir: Path) -> Path:
    """Resume a copy of a run in bf16."""
    copy = run_dir.with_name(f"{run_dir.name}-then-bf16")
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("model"))
    config = tomllib.loads((copy / "config.toml").read_text())
    config["devices"].pop("fp8", None)
    config["devices"]["precision"] = "bf16-params"
    wmtp.run(config, resume=copy)
    shutil.rmtree(copy / "checkpoints")
    return copy


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        print(json.dumps({"run": folder.name, "fp8": losses(folder), "then bf16": losses(then_bf16(folder))}), flush=True)

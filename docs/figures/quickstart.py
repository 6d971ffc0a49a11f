"""Draws the loss of every head of a run.

    uv run --with matplotlib python docs/figures/quickstart.py RUN_DIR docs/figures/quickstart.svg

The picture in docs/quickstart.md is this, of ``wmtp run examples/quickstart.toml``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "wmtp", "font.family": "sans-serif", "font.size": 10}

_SMOOTH = 0.9


def smoothed(values: list[float]) -> list[float]:
    """An exponential mean, without the bias of its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = _SMOOTH * mean + (1 - _SMOOTH) * value
        weight = _SMOOTH * weight + (1 - _SMOOTH)
        out.append(mean / weight)
    return out


def main(run_dir: Path, target: Path) -> None:
    """Draw ``metrics.jsonl`` of ``run_dir`` into ``target``."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    heads = sum(name.startswith("loss/head_") for name in rows[0])
    colours = mpl.colormaps["viridis"]([k / heads for k in range(heads)])
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for k, colour in enumerate(colours, start=1):
        axes.plot(steps, smoothed([row[f"loss/head_{k}"] for row in rows]), color=colour, label=f"head {k}: token t+{k}")
        measured = [(row["step"], row[f"eval/loss/head_{k}"]) for row in rows if f"eval/loss/head_{k}" in row]
        axes.plot(*zip(*measured, strict=True), "o", color=colour, markeredgecolor="white", markersize=7)
    axes.plot([], [], "o", color="grey", label="on held-out functions")
    axes.set(xlabel="optimizer step", ylabel="cross entropy of a byte (nats)", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

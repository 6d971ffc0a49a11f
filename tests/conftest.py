"""Fixtures of the end-to-end tests: a recipe that trains in a second, and the command line as a user runs it."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RECIPE = """
[run]
output_dir = "{folder}/runs"
[models.base]
type = "scratch"
vocab_size = 258
hidden_size = 32
layers = 2
attention_heads = 2
intermediate_size = 48
max_positions = 128
[models.base.heads]
horizon = 3
warmup_steps = 4
[tokenizer]
type = "bytes"
[datasets.code]
type = "jsonl"
uri = "{folder}/code.jsonl"
[data.train]
max_length = 64
batch_size = 4
[data.eval]
holdout = 0.2
[trainer]
type = "baseline-mtp"
[optimizer]
type = "adamw"
lr = 3e-3
[schedule]
warmup_steps = 5
[train]
max_steps = 40
eval_interval = 15
[checkpoints]
save_interval = 5
[tracker]
type = "jsonl"
"""

#: ``wmtp …`` whose run, once it has logged the step that stands before its other words, waits for a signal: however late that
#: comes, the run has not ended
HELD = """
import sys, time
from wmtp.cli import run_from_shell
from wmtp.training.loop import Fit
last, step, steps, seen = int(sys.argv.pop(1)), Fit._optimizer_step, Fit._steps, []
def begin(self, interrupt):
    seen.append(interrupt)
    return steps(self, interrupt)
def hold(self):
    while self._step > last and seen[-1].requested is None:
        time.sleep(0.005)
    step(self)
Fit._steps, Fit._optimizer_step = begin, hold
run_from_shell()
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe file beside its data; trains a tiny model in about a second."""
    return write_recipe(tmp_path)


def write_recipe(folder):
    with (folder / "code.jsonl").open("w") as file:
        for i in range(60):
            lines = "\n".join(f"    x{j} = {i * j % 17}" for j in range(i % 7 + 1))
            file.write(json.dumps({"id": f"f{i}", "prompt": f"def f{i}():\n", "completion": lines}) + "\n")
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(folder=folder))
    return path


@pytest.fixture
def wmtp(preloaded):
    """Runs ``wmtp …`` in a process of its own and returns it when it has ended."""
    return preloaded.run


def command(*arguments):
    """The words that start ``wmtp …`` in a new interpreter; seconds slower than `preloaded`."""
    return [sys.executable, "-m", "wmtp", *map(str, arguments)]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

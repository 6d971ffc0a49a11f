"""Packages that a plain run on a CPU must not import: each costs seconds of its start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: beyond what transformers itself imports
# not torchao: transformers imports it where it is installed
HEAVY = (
    "mlflow", "wandb", "tensorboard", "sqlalchemy", "alembic", "pandas", "pyarrow", "sklearn", "matplotlib", "IPython",
    "datasets", "bitsandbytes", "peft", "gguf", "obstore", "boto3", "torchvision",
    "liger_kernel", "torch._inductor.compile_fx",
)  # fmt: skip
RECIPE = """
[run]
output_dir = "{folder}/runs"
name = "plain"
[models.base]
type = "scratch"
vocab_size = 320
hidden_size = 16
layers = 2
attention_heads = 2
max_positions = 64
[tokenizer]
type = "bytes"
[datasets.code]
type = "jsonl"
uri = "{folder}/code.jsonl"
[data.train]
max_length = 32
batch_size = 2
[trainer]
type = "baseline-mtp"
[train]
max_steps = 2
[devices]
device = "cpu"
[tracker]
type = "jsonl"
"""
SCRIPT = """
import sys
from wmtp.cli import main
code = main(["run", sys.argv[1]])
print("IMPORTED", *sorted(sys.modules))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_plain_run_on_a_cpu_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "code.jsonl").write_text('{"id": "a", "prompt": "one two ", "completion": "three four five six"}\n' * 4)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(recipe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split("IMPORTED", 1)[1].split())
    assert "transformers" in imported
    assert sorted(imported & set(HEAVY)) == []

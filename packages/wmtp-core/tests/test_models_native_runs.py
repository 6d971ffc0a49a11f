"""Runs that train a model's own layers for multi-token prediction: resumed bit for bit, by every trainer, on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_folders import LAYERS, NAMES, NAMING, copy_tables, native_folder, tensors_of

from wmtp.cli import main
from wmtp.tokenizers.bytes import BytesTokenizer

RECIPE = """
[run]
output_dir = "{place}/runs"
[models.base]
type = "hf"
uri = "{place}/base"
[models.base.heads]
horizon = 3
trunk_gradient = "{gradient}"
warmup_steps = 1
lr_factor = 3.0
[datasets.code]
type = "jsonl"
uri = "{place}/code.jsonl"
[data.train]
max_length = 48
batch_size = 4
[optimizer]
lr = 3e-3
[schedule]
type = "constant"
[train]
max_steps = 4
[checkpoints]
save_interval = 2
[tracker]
type = "jsonl"
{more}
"""


def prepare(place: Path, name: str, gradient: str = "joint", trainer: str = "baseline-mtp", more: str = "") -> Path:
    native_folder(place / "base", name)
    BytesTokenizer().save(place / "base")
    lines = [{"prompt": f"add {n} ", "completion": f"{n} + {n * n} = {n + n * n}"} for n in range(24)]
    (place / "code.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = place / "recipe.toml"
    file.write_text(RECIPE.format(place=place, gradient=gradient, more=f'[trainer]\ntype = "{trainer}"\n{more}'))
    return file


def run(recipe: Path, name: str, *more: str) -> Path:
    assert main(["run", str(recipe), "--run-name", name, *more]) == 0
    return recipe.parent / "runs" / name / "model"


def assert_native_trained(place: Path, model: Path, name: str, *, trunk: bool, norms: bool = True) -> None:
    before, after = tensors_of(place / "base"), tensors_of(model)
    assert before.keys() == after.keys()
    begin, parts = NAMING[name](0)
    own = {key for key in before if key.startswith(begin) or key.removesuffix(".weight") in parts}
    same = {key for key in before if torch.equal(before[key], after[key])}
    # an adapter trains matrices alone
    assert not {f"{part}.weight" for part in parts[: 3 if norms else 0]} & same
    # experts that no token chose learn nothing, nor does a router's correction
    assert any(f"{begin}self_attn" in key for key in own - same)
    assert (f"model.layers.{LAYERS - 1}.self_attn.o_proj.weight" not in same) == trunk
    assert json.loads((model / "mtp_heads.json").read_text()) == {"format": 1, "kind": "native", "horizon": 3}


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path):
    recipe = prepare(tmp_path, "qwen3_5")
    whole = run(recipe, "whole")
    run(recipe, "parts", "--set", "train.max_steps=2")
    assert main(["run", "--resume", str(tmp_path / "runs/parts"), "--set", "train.max_steps=4"]) == 0
    one, other = tensors_of(whole), tensors_of(tmp_path / "runs/parts/model")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert_native_trained(tmp_path, whole, "qwen3_5", trunk=True)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["joint", "detach"])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_trained(tmp_path: Path, name: str, gradient: str):
    recipe = prepare(tmp_path, name, gradient)
    packing = [] if name in ("deepseek_v3",) else ["--set", "data.train.packing=true"]
    assert_native_trained(tmp_path, run(recipe, "first", *packing), name, trunk=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "more"),
    [
        ("rho1-wmtp", '[models.ref]\ntype = "hf"\nuri = "{place}/base"\n'),
        ("focal", ""),
        ("horizon-decay", ""),
        ("eaft", ""),
        ("entropy-top", ""),
    ],
)
def test_every_way_to_weigh_trains_them(tmp_path: Path, trainer: str, more: str):
    recipe = prepare(tmp_path, "mimo", trainer=trainer, more=more.format(place=tmp_path))
    assert_native_trained(tmp_path, run(recipe, "first"), "mimo", trunk=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5", "glm4_moe"])
def test_the_critic_trains_them_after_its_stage_of_values(tmp_path: Path, name: str):
    """Two stages, and weights by a module that is learned along."""
    recipe = prepare(tmp_path, name, trainer="critic-wmtp", more="value_steps = 2\nvalue_width = 16\n")
    lines = [
        {
            "prompt": f"add {n} ",
            "completion": f"{n} + {n * n} = {n + n * n + n % 2}",
            "is_correct": n % 2 == 0,
            "group": str(n // 4),
        }
        for n in range(24)
    ]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = run(recipe, "first", "--set", "data.train.packing=false", "--set", "train.max_steps=6")
    assert_native_trained(tmp_path, model, name, trunk=True)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["full", "adapters"])
@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3"])
def test_they_are_trained_beside_an_adapter_of_the_trunk(tmp_path: Path, name: str, heads: str):
    recipe = prepare(tmp_path, name)
    model = run(recipe, "first", "--set", "models.base.lora.rank=2", "--set", f"models.base.lora.heads={heads}")
    assert main(["export", str(model.parent), str(tmp_path / "merged"), "--format", "wmtp"]) == 0
    assert_native_trained(tmp_path, tmp_path / "merged", name, trunk=True, norms=heads == "full")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "copied"),
    [("qwen3_5", False), ("deepseek_v3", False), ("deepseek_v3", True), ("mimo", False), ("exaone", False)],
)
def test_two_processes_do_as_one(tmp_path: Path, name: str, copied: bool):
    """Divided by FSDP2: layers, heads, and the tables that DeepSeek's modules have, their own or the model's."""
    recipe = prepare(tmp_path, name)
    copies = copy_tables(tmp_path / "base") if copied else {}
    one = run(recipe, "one")
    command = [sys.executable, "-m", "wmtp", "run", str(recipe), "--run-name", "two", "--set", "launcher.processes=2"]
    done = subprocess.run(
        command, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = tensors_of(one), tensors_of(tmp_path / "runs/two/model")
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        # Adam makes whole steps of gradients that are all but zero, whose sign is rounding
        assert ((tensor - right[key]).abs() > 2e-4).float().mean() < 1e-3, key
    assert all(torch.equal(right[key], right[own]) for key, own in copies.items())

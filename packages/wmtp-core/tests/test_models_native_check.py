"""Damage of a model's own layers is seen by ``wmtp check``, from ``config.json`` and the headers of the files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_folders import LAYERS, NAMES
from safetensors.torch import load_file, save_file

from wmtp.cli import main
from wmtp.config.schema import HeadsConfig
from wmtp.models.native.headers import native_problems

RECIPE = """
[models.base]
type = "hf"
uri = "{folder}"
{heads}
[datasets.code]
type = "python-source"
[trainer]
type = "baseline-mtp"
"""
WANTED = HeadsConfig(horizon=2)
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


def changed(source: Path, folder: Path, change: Change) -> Path:
    folder.mkdir()
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without(*stems: str) -> Change:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(stems)]:
            del tensors[name]

    return change


def put(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors, _: tensors.update({name: tensor})


def say(**fields: object) -> Change:
    return lambda _, config: config.update(fields)


#: layout, what was done to its folder, what is said, and what is not
DAMAGES: dict[str, tuple[str, Change, str, str | None]] = {
    "one tensor": ("qwen3_5", without("mtp.fc.weight"), "mtp.fc.weight is missing; fetch the model again, or", None),
    "a tensor of its layer": (
        "glm4_moe",
        without(f"model.layers.{LAYERS}.mlp.experts.7.up_proj"),
        "experts.7.up_proj.weight is missing",
        None,
    ),
    "all of its layer": ("qwen3_5", without("mtp.layers."), "mtp.layers.0.mlp.down_proj.weight is missing; ", None),
    "all of it": (
        "qwen3_5",
        without("mtp."),
        "config.json says mtp_num_hidden_layers = 1, and the folder holds none of them",
        None,
    ),
    "a module": ("mimo_2", without("model.mtp_layers.1."), "num_nextn_predict_layers = 2, and the folder holds 1", None),
    "the first module": ("mimo_2", without("model.mtp_layers.0."), "num_nextn_predict_layers = 2, and the folder", None),
    "more modules than are said": ("mimo_2", say(num_nextn_predict_layers=1), "and the folder holds 2 (number 0, 1)", None),
    "a shape": (
        "mimo",
        put("model.mtp_layers.0.mlp.up_proj.weight", torch.zeros(5, 5)),
        "up_proj.weight has shape [5, 5] in place of [48, 32]",
        None,
    ),
    "the projection's shape": ("exaone", put("mtp.fc.weight", torch.zeros(32, 32)), "[32, 32] in place of [32, 64]", None),
    "two layouts": (
        "qwen3_5",
        put("model.mtp_layers.0.input_proj.weight", torch.zeros(32, 64)),
        "several layouts, 'qwen' (mtp.",
        None,
    ),
    "quantized": (
        "ernie",
        put("model.mtp_linear_proj.0.weight", torch.zeros(32, 64, dtype=torch.float8_e4m3fn)),
        "mtp_linear_proj.0.weight is quantized (F8_E4M3); use the model in bf16 or fp32, or name another kind",
        "fetch",
    ),
    "another window": (
        "exaone",
        say(mtp_sliding_windows=[8]),
        "config.json says mtp_sliding_windows = 8, and the model's first layer, as which it is called, has 4; name",
        "fetch",
    ),
    "no window": ("exaone", say(mtp_layer_types=["full_attention"]), "mtp_layer_types = 'full_attention', and", "fetch"),
    "turned by position": (
        "exaone",
        say(layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"]),
        "its queries and keys are turned by position, and not those of the model's first layer",
        "fetch",
    ),
    "modules that WMTP does not open": (
        "qwen3_5",
        lambda tensors, config: (
            config.update(mtp_num_hidden_layers=2),
            tensors.update({"mtp.layers.1.input_layernorm.weight": torch.zeros(32)}),
        ),
        "WMTP opens 1 module of the layout 'qwen', and the folder holds 2; name another kind",
        "fetch",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_what_to_do(damage: str, folder_of, tmp_path: Path):
    name, change, said, unsaid = DAMAGES[damage]
    folder = changed(folder_of(name), tmp_path / "changed", change)
    [line] = native_problems(folder, WANTED)
    assert said in line
    assert unsaid is None or unsaid not in line
    [named] = native_problems(folder, HeadsConfig(horizon=3, kind="native"))
    assert named == f"kind: {line}"
    [alone] = native_problems(folder, None)
    assert alone == f"{line}; or write horizon = 1 in [models.base.heads] to train without them"
    for other in (HeadsConfig(horizon=1), HeadsConfig(horizon=2, kind="shared")):
        assert not [*native_problems(folder, other)]


@pytest.mark.parametrize("name", NAMES)
def test_whole_folders_are_nothing_to_complain_of(name: str, folder_of):
    for heads in (WANTED, HeadsConfig(kind="native", horizon=4), None):
        assert not [*native_problems(folder_of(name), heads)]


def test_a_folder_without_any_has_no_native_heads(folder_of, tmp_path: Path):
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        without("mtp.")(tensors, config)
        del config["mtp_num_hidden_layers"]

    folder = changed(folder_of("qwen3_5"), tmp_path / "plain", change)
    assert not [*native_problems(folder, WANTED)]
    [line] = native_problems(folder, HeadsConfig(kind="native"))
    assert line.startswith("kind: 'native' are the model's own layers")
    assert "hold none of a layout" in line


def test_heads_that_the_folder_brings_come_before_its_own_layers(folder_of, tmp_path: Path):
    folder = changed(folder_of("qwen3_5"), tmp_path / "changed", without("mtp.fc.weight"))
    (folder / "mtp_heads.json").write_text('{"kind": "block"}')
    assert not [*native_problems(folder, WANTED)]


def test_an_embedding_that_is_no_table_is_left_to_opening(folder_of, tmp_path: Path):
    folder = changed(folder_of("mimo"), tmp_path / "flat", put("model.embed_tokens.weight", torch.zeros(32)))
    assert not [*native_problems(folder, WANTED)]


def test_experts_that_are_joined_in_the_model_alone_are_left_to_transformers(folder_of, tmp_path: Path):
    def join(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        without(f"model.layers.{LAYERS - 1}.mlp.experts.")(tensors, config)
        tensors[f"model.layers.{LAYERS - 1}.mlp.experts.gate_up_proj"] = torch.zeros(12, 32, 32)

    folder = changed(folder_of("glm4_moe"), tmp_path / "joined", join)
    assert not [*native_problems(folder, WANTED)]
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith("eh_proj.weight")}, file)
    [line] = native_problems(folder, WANTED)
    assert f"model.layers.{LAYERS}.eh_proj.weight is missing" in line


def test_the_command_says_the_line_and_imports_no_torch(folder_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = changed(folder_of("mimo"), tmp_path / "changed", without("model.mtp_layers.0.input_proj"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder, heads='[models.base.heads]\nkind = "native"\nhorizon = 2'))
    script = "import sys; from wmtp.cli import main; assert main(['check', sys.argv[1]]) == 2 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script, str(recipe)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    place = f"{recipe}:6: models.base.heads.kind: the model's own layers for multi-token prediction cannot be opened: "
    assert f"error: {place}model.mtp_layers.0.input_proj.weight is missing; fetch the model again, or" in done.stderr
    recipe.write_text(RECIPE.format(folder=folder, heads=""))
    assert main(["check", str(recipe)]) == 2
    assert f"{recipe}:2: models.base.heads: the model's own" in capsys.readouterr().err
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])
    assert main(["check", str(recipe)]) == 2
    assert "model.safetensors: not a whole safetensors file (it has " in capsys.readouterr().err

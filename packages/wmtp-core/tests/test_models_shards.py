"""A folder's own files: the model is written into shards of the same names, with the same tensors and types."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from native_folders import LAYERS, NAMES, native_folder, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.config.schema import HeadsConfig
from wmtp.exporting.command import export_model
from wmtp.models import MTPModel, build_model, load_model
from wmtp.models.loaders.hf import HfLoader

INDEX = "model.safetensors.index.json"
#: as DeepSeek, Qwen and MiMo name theirs
SHARDS = ("model-00001-of-000003.safetensors", "model.safetensors-00002-of-00003.safetensors", "mtp.safetensors")


def split(folder: Path, metadata: dict | None = None) -> Path:
    """Put the tensors of a folder of one file into three: layers apart from their parts, in no order of names."""
    tensors = load_file(folder / "model.safetensors")
    place = {name: SHARDS[2 if ("mtp" in name or f"layers.{LAYERS}" in name) else n % 2] for n, name in enumerate(tensors)}
    for shard in set(place.values()):
        save_file({name: t for name, t in tensors.items() if place[name] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total} | (metadata or {}), "weight_map": place}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def files_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {file.name: load_file(file) for file in folder.glob("*.safetensors")}


def assert_same_files(before: Path, after: Path) -> None:
    old, new = files_of(before), files_of(after)
    assert new.keys() == old.keys()
    for file, tensors in old.items():
        assert new[file].keys() == tensors.keys(), file
        for name, tensor in tensors.items():
            assert new[file][name].dtype == tensor.dtype, name
            assert torch.equal(new[file][name], tensor), name
    assert [(place / INDEX).exists() for place in (before, after)].count(True) in (0, 2)
    if (before / INDEX).exists():
        one, other = (json.loads((place / INDEX).read_text()) for place in (before, after))
        assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_shards_come_out_as_they_went_in(name: str, tmp_path: Path):
    """In bf16, but for what published folders have otherwise: routers in bf16, their corrections and one norm in fp32."""
    folder = native_folder(tmp_path / "base", name, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        if ".gate.weight" in key:
            tensors[key] = tensor.to(torch.bfloat16)
        if key.endswith("0.input_layernorm.weight"):
            tensors[key] = torch.randn_like(tensor.float())  # of more digits than bf16 has
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    split(folder, {"total_parameters": 5, "by": "somebody"})
    model = load_model(folder)
    assert model.heads.kind == "native"
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(folder, tmp_path / "saved")
    model.save_base(tmp_path / "base_again")
    assert_same_files(folder, tmp_path / "base_again")


def test_one_file_stays_one_file_and_an_export_is_the_same(tmp_path: Path):
    folder = native_folder(tmp_path / "base", "mimo")
    load_model(folder).save_pretrained(tmp_path / "saved")
    assert_same_files(folder, tmp_path / "saved")
    export_model(str(tmp_path / "saved"), tmp_path / "exported", format="hf")
    assert_same_files(folder, tmp_path / "exported")


def test_kept_layers_stay_in_their_shard_beside_heads_of_another_kind(tmp_path: Path):
    folder = split(native_folder(tmp_path / "base", "qwen3_5"))
    opened(folder, HeadsConfig(horizon=2, kind="block")).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "mtp_heads.safetensors").unlink()
    assert_same_files(folder, tmp_path / "saved")


def opened(folder: Path, heads: HeadsConfig | None = None, dtype: torch.dtype | None = None) -> MTPModel:
    return build_model(HfLoader().load(folder, dtype=dtype, seed=0), heads, seed=0)


def test_what_was_trained_is_written_in_the_same_shards_and_loses_no_digit(tmp_path: Path):
    """A run trains in fp32: all that it wrote is fp32, and the index says the new size."""
    folder = split(native_folder(tmp_path / "base", "glm4_moe", torch.bfloat16))
    model = opened(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 2**-12)
    model.save_pretrained(tmp_path / "saved")
    old, new = files_of(folder), files_of(tmp_path / "saved")
    assert {file: set(tensors) for file, tensors in old.items()} == {file: set(tensors) for file, tensors in new.items()}
    after = {name: tensor for tensors in new.values() for name, tensor in tensors.items()}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    before = {name: tensor for tensors in old.values() for name, tensor in tensors.items()}
    for name, tensor in before.items():
        if "e_score" not in name:
            assert torch.equal(after[name], tensor.float() * (1.0 + 2**-12)), name


def test_a_router_that_was_trained_keeps_what_bf16_cannot_hold(tmp_path: Path):
    folder = native_folder(tmp_path / "base", "glm4_moe", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    routers = [name for name in tensors if name.endswith(".gate.weight")]
    save_file(tensors | {name: tensors[name].bfloat16() for name in routers}, folder / "model.safetensors")
    model = load_model(folder)
    gates = [parameter for name, parameter in model.base.named_parameters() if name.endswith("mlp.gate.weight")]
    assert gates
    assert {gate.dtype for gate in gates} == {torch.float32}
    with torch.no_grad():
        gates[0].add_(2**-13)
    model.save_pretrained(tmp_path / "saved")
    types = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "saved").items() if name in routers}
    assert sorted(map(str, types.values())) == ["torch.bfloat16"] * (len(routers) - 1) + ["torch.float32"]


def test_a_tied_copy_in_the_folder_is_written_again(tmp_path: Path):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    tensors = tensors_of(tmp_path / "base")
    assert "lm_head.weight" not in tensors
    copied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copied, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = opened(tmp_path / "base", HeadsConfig(horizon=1))
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(tmp_path / "base", tmp_path / "saved")
    with torch.no_grad():
        model.base.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "saved")
    after = tensors_of(tmp_path / "saved")
    assert torch.equal(after["lm_head.weight"], tensors["model.embed_tokens.weight"] + 1)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


def test_a_model_is_saved_over_its_own_folder_and_over_an_older_one(tmp_path: Path):
    """The files are replaced whole, for the model may be mapped from them."""
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).save_pretrained(tmp_path / "base")
    split(tmp_path / "base")
    before = tensors_of(tmp_path / "base")
    model = opened(tmp_path / "base", HeadsConfig(horizon=1))
    model.save_pretrained(tmp_path / "base")
    after = tensors_of(tmp_path / "base")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_bytes(b"of another model")
    model.save_pretrained(tmp_path / "old")
    assert_same_files(tmp_path / "base", tmp_path / "old")


def test_shards_are_written_tensor_by_tensor(tmp_path: Path):
    """No copy of the model is made: what Python holds meanwhile is a part of one tensor."""
    shape = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).bfloat16().save_pretrained(tmp_path / "base")
    model = opened(tmp_path / "base", HeadsConfig(horizon=1))
    size = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "base").values())
    tracemalloc.start()
    try:
        model.save_pretrained(tmp_path / "saved")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 20 * 2**20
    assert peak < 8 * 2**20, peak

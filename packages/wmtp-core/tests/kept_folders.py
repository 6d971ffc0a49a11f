"""Model folders that hold more than is trained, and comparisons of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

from wmtp.config.schema import HeadsConfig
from wmtp.errors import WMTPError
from wmtp.models import MTPModel, build_model, load_model
from wmtp.models.loaders.hf import HfLoader

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 64,
    "mtp_num_hidden_layers": 1,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "num_position_embeddings": 16,
}
MTP = ["mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.input_layernorm.weight", "mtp.layers.0.self_attn.q_proj.weight"]


def add(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Put bf16 tensors of ``names`` into a folder of one file."""
    generator = torch.Generator().manual_seed(5)
    extra = {name: torch.randn(6, 4, generator=generator).to(torch.bfloat16) for name in names}
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return extra


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **fields: object) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | fields))


def text_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**TEXT)).save_pretrained(folder)
    return folder


def multimodal_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=TEXT, vision_config=VISION)
    Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    add(folder, MTP)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "none"}')
    return folder


def assert_used_but_not_trained(folder: Path, why: str) -> None:
    """The metadata say why, so that no run begins; the model opens, and is never saved in part."""
    said = HfLoader().info(folder).unsavable
    assert said is not None
    assert re.search(why, said), said
    with pytest.raises(WMTPError, match=why):
        load_model(folder).save_pretrained(folder.parent / "not_saved")
    assert not list((folder.parent / "not_saved").iterdir())


def trained(folder: Path) -> MTPModel:
    """Open a folder's model, with extra heads and every number 1 more than in the folder."""
    loaded = HfLoader().load(folder, dtype=torch.float32, seed=0)
    model = build_model(loaded, HeadsConfig(horizon=2, kind="block"), seed=0)
    with torch.no_grad():
        for tensor in {tensor.data_ptr(): tensor for tensor in model.base.state_dict().values()}.values():
            tensor.add_(1)
    return model


def assert_trained(old: dict[str, Tensor], new: dict[str, Tensor], kept: set[str]) -> None:
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        if name in kept:
            assert new[name].dtype == tensor.dtype
            assert torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8)), name
        else:
            assert torch.equal(new[name], tensor.float() + 1), name

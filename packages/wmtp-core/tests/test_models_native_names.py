"""Names and shapes of models' own layers, held against what servers' loaders read.

Read in vLLM 0.32 (``models/qwen3_next_mtp.py``, ``qwen3_5_mtp.py``, ``mimo_mtp.py``, ``glm4_moe_mtp.py``, ``deepseek_mtp.py``,
``ernie_mtp.py``, ``exaone_moe_mtp.py``) and in SGLang 0.5.23 (``models/qwen3_next.py``, ``qwen3_5_mtp.py``, ``mimo_mtp.py``,
``glm4_moe.py``, ``deepseek_common/deepseek_weight_loader.py``, ``ernie4_eagle.py``, ``exaone_moe.py``). Both want a tensor for
every one of these parameters; tables (``embed_tokens``, ``shared_head.head``) they take from the model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_folders import LAYERS, MODELS, NAMES, native_folder
from safetensors.torch import load_file, save_file

from wmtp.models.loaders.files import tensor_shapes
from wmtp.models.loaders.hf import HfLoader

D = 32
NORMS = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}


def gated(stem: str, width: int) -> dict[str, tuple[int, ...]]:
    up = {f"{stem}.{part}_proj.weight": (width, D) for part in ("gate", "up")}
    return up | {f"{stem}.down_proj.weight": (D, width)}


def attention(q: int, kv: int, *, out: int = D, biases: bool = False, norms: int | None = None) -> dict[str, tuple[int, ...]]:
    rows = {"q": q, "k": kv, "v": kv}
    shapes = {f"self_attn.{part}_proj.weight": (rows[part], D) for part in rows} | {"self_attn.o_proj.weight": (D, out)}
    if biases:
        shapes |= {f"self_attn.{part}_proj.bias": (rows[part],) for part in rows}
    if norms is not None:
        shapes |= {f"self_attn.{part}_norm.weight": (norms,) for part in "qk"}
    return shapes


def experts(shared: str, width: int = 16) -> dict[str, tuple[int, ...]]:
    shapes = {"mlp.gate.weight": (12, D)} | gated(f"mlp.{shared}", width)
    for number in range(12):
        shapes |= gated(f"mlp.experts.{number}", width)
    return shapes


MLA = {
    "self_attn.q_a_proj.weight": (16, D),
    "self_attn.q_a_layernorm.weight": (16,),
    "self_attn.q_b_proj.weight": (4 * 12, 16),
    "self_attn.kv_a_proj_with_mqa.weight": (16 + 4, D),
    "self_attn.kv_a_layernorm.weight": (16,),
    "self_attn.kv_b_proj.weight": (4 * 16, 16),
    "self_attn.o_proj.weight": (D, 4 * 8),
}
CORRECTION = {"mlp.gate.e_score_correction_bias": (12,)}
GATED_ATTENTION = attention(2 * D, 16, norms=8)  # the query comes with a gate
#: the decoder layer of each layout, as the servers' loaders name its parameters
LAYER: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen3_5": NORMS | GATED_ATTENTION | gated("mlp", 48),
    "qwen3_next": NORMS | GATED_ATTENTION | experts("shared_expert") | {"mlp.shared_expert_gate.weight": (1, D)},
    "mimo": NORMS | attention(D, 16, biases=True) | gated("mlp", 48),
    "glm4_moe": NORMS | attention(D, 16) | experts("shared_experts") | CORRECTION,
    "deepseek_v3": NORMS | MLA | experts("shared_experts") | CORRECTION,
    "ernie": NORMS | attention(D, 16) | gated("mlp", 48),
    "exaone": NORMS | attention(D, 16, norms=8) | gated("mlp", 48),
}
DEEPSEEK = {"enorm.weight": (D,), "hnorm.weight": (D,), "eh_proj.weight": (D, 2 * D), "shared_head.norm.weight": (D,)}
TABLES = {f"{table}.weight": (258, D) for table in ("embed_tokens", "shared_head.head")}
QWEN = {f"mtp.{part}.weight": (D,) for part in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}


def module_of(name: str, number: int) -> dict[str, tuple[int, ...]]:
    """Name one module's tensors as the loaders do."""
    layer = LAYER[name.removesuffix("_2")]
    if name.startswith(("qwen", "exaone")):
        return QWEN | {"mtp.fc.weight": (D, 2 * D)} | {f"mtp.layers.{number}.{part}": shape for part, shape in layer.items()}
    if name.startswith("mimo"):
        own = {f"{part}_layernorm.weight": (D,) for part in ("token", "hidden", "final")} | {"input_proj.weight": (D, 2 * D)}
        return {f"model.mtp_layers.{number}.{part}": shape for part, shape in (layer | own).items()}
    if name == "ernie":
        own = {f"model.mtp_{part}_norm.{number}.weight": (D,) for part in ("emb", "hidden")}
        own |= {f"model.mtp_linear_proj.{number}.weight": (D, 2 * D)}
        return own | {f"model.mtp_block.{number}.{part}": shape for part, shape in layer.items()}
    return {f"model.layers.{LAYERS + number}.{part}": shape for part, shape in (layer | DEEPSEEK | TABLES).items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_tensors_are_those_that_loaders_read(name: str, tmp_path: Path):
    fields = MODELS[name][1]
    modules = fields.get("mtp_num_hidden_layers", fields.get("num_nextn_predict_layers", 1))
    expected = {key: shape for number in range(modules) for key, shape in module_of(name, number).items()}
    folder = native_folder(tmp_path / "base", name)
    found = HfLoader().info(folder).native
    assert found is not None
    assert found.problem is None
    shapes = tensor_shapes(folder / "model.safetensors")
    assert {key: shapes[key] for key in found.tensors} == expected


@pytest.mark.parametrize("name", ["qwen3_next", "mimo", "glm4_moe", "deepseek_v3", "ernie", "exaone"])
def test_every_tensor_that_a_loader_needs_is_missed(name: str, tmp_path: Path):
    """All of them, in turn: none is optional but the tables, which go together."""
    folder = native_folder(tmp_path / "base", name)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    needed = [key for key in module_of(name, 0) if "embed_tokens" not in key and "shared_head.head" not in key]
    for key in [needed[0], *needed[1 :: max(1, len(needed) // 12)]]:
        less = {other: torch.empty_like(tensor, device="cpu") for other, tensor in tensors.items() if other != key}
        save_file(less, file, metadata={"format": "pt"})
        found = HfLoader().info(folder).native
        assert found is not None
        assert found.problem is not None, key
        assert f"{key} is missing" in found.problem.text, key

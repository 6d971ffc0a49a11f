"""Random model folders with layers of their own for multi-token prediction, in the layouts that are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB, WIDTH, LAYERS = 258, 32, 4
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 12, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
#: model type and fields of config.json
MODELS: dict[str, tuple[str, dict]] = {
    "qwen3_5": ("qwen3_5_text", _COMMON | _LINEAR | {"mtp_num_hidden_layers": 1}),
    "qwen3_next": (
        "qwen3_next",
        _COMMON
        | _LINEAR
        | {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "mimo": ("qwen2", _COMMON | {"num_nextn_predict_layers": 1}),
    "mimo_2": ("qwen2", _COMMON | {"num_nextn_predict_layers": 2}),
    "glm4_moe": ("glm4_moe", _COMMON | _EXPERTS | {"head_dim": 8, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}),
    "deepseek_v3": (
        "deepseek_v3",
        _COMMON | _EXPERTS | _MLA | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 2},
    ),
    "ernie": (
        "ernie4_5_moe",
        _COMMON
        | {
            "moe_num_experts": 12,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "num_nextn_predict_layers": 1,
        },
    ),
    "exaone": (
        "exaone_moe",
        _COMMON
        | {
            "head_dim": 8,
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
            "sliding_window": 4,
            "num_nextn_predict_layers": 1,
        },
    ),
}
#: those whose layer is like the model's first
LIKE_THE_FIRST = ("ernie", "exaone")
NAMES = tuple(MODELS)


def base_of(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    kind, fields = MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if "norm" in own or own.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def native_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a folder whose further decoder layer is made of a twin of the model with one layer more."""
    model = base_of(name)
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(folder)
    kind, fields = MODELS[name]
    twin = folder.parent / f"{folder.name}_twin"
    torch.manual_seed(11)
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).to(dtype)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    other.save_pretrained(twin)  # experts as files have them
    theirs = load_file(twin / "model.safetensors")
    generator = torch.Generator().manual_seed(7)

    def new(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)).to(dtype)

    added: dict[str, Tensor] = {}
    modules = fields.get("mtp_num_hidden_layers", fields.get("num_nextn_predict_layers", 1))
    for module in range(modules):
        begin, parts = NAMING[name](module)
        number = 0 if name in LIKE_THE_FIRST else LAYERS - 1
        stem = next(own for own in theirs if f"layers.{number}." in own).partition(f"layers.{number}.")[0]
        old = f"{stem}layers.{number}."
        added |= {begin + own.removeprefix(old): tensor.clone() for own, tensor in theirs.items() if own.startswith(old)}
        for own in parts:
            table = own.endswith(("embed_tokens", "shared_head.head"))
            matrix = (VOCAB, WIDTH) if table else (WIDTH, 2 * WIDTH)
            added[f"{own}.weight"] = new(*matrix) if table or own.endswith(("fc", "proj", "proj.0")) else new(WIDTH)
    file = folder / "model.safetensors"
    # what transformers keeps in fp32, whatever the folder's type is
    added |= {own: tensor.float() for own, tensor in added.items() if _is_kept_in_fp32(name, own)}
    save_file(load_file(file) | added, file, metadata={"format": "pt"})
    if name.startswith("mimo"):
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "mimo",
            "architectures": ["MiMoForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_mimo.X"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "configuration_mimo.py").write_text("raise SystemExit('code of a folder was run')\n")
    return folder


def copy_tables(folder: Path) -> dict[str, str]:
    """Put copies of the model's embedding and unembedding in the place of its further layers', as real folders have them.

    Returns:
        the names of the copies, and of what each is a copy of.
    """
    tensors = tensors_of(folder)
    tables = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    copies = {name: own for name in tensors for part, own in tables.items() if name.endswith(part) and name != own}
    both = {name: tensors[copies.get(name, name)].clone() for name in tensors}
    save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    return copies


def _is_kept_in_fp32(name: str, own: str) -> bool:
    return "e_score" in own or (".gate.weight" in own and name != "qwen3_next")


def _deepseek(module: int) -> tuple[str, list[str]]:
    begin = f"model.layers.{LAYERS + module}."
    return begin, [
        f"{begin}{part}" for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head")
    ]


def _mimo(module: int) -> tuple[str, list[str]]:
    begin = f"model.mtp_layers.{module}."
    return begin, [f"{begin}{part}" for part in ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")]


def _qwen(module: int) -> tuple[str, list[str]]:
    return f"mtp.layers.{module}.", ["mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm"]


def _ernie(module: int) -> tuple[str, list[str]]:
    return f"model.mtp_block.{module}.", [
        f"model.{part}.{module}" for part in ("mtp_emb_norm", "mtp_hidden_norm", "mtp_linear_proj")
    ]


NAMING: dict[str, Callable[[int], tuple[str, list[str]]]] = {
    "qwen3_5": _qwen,
    "qwen3_next": _qwen,
    "mimo": _mimo,
    "mimo_2": _mimo,
    "glm4_moe": _deepseek,
    "deepseek_v3": _deepseek,
    "ernie": _ernie,
    "exaone": _qwen,
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found

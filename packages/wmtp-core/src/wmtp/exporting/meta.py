"""Export to ``params.json`` and ``consolidated.pth``, Meta's layout (arXiv 2404.19737).

`wmtp.models.loaders.meta` reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from wmtp.errors import ConfigError
from wmtp.models.loaders.meta import BLOCK_NAMES, OUTSIDE_NAMES
from wmtp.models.mtp import MTPModel

__all__ = ["write_meta"]


def write_meta(model: MTPModel, folder: Path) -> None:
    """Write a Llama model with ``block`` heads in Meta's layout.

    Tied embeddings are written twice, since the layout has both. ``params.json`` gets a ``multiple_of`` and, where it must be,
    a ``ffn_dim_multiplier`` with which Meta's formula gives this model's width.

    Args:
        model: with H ≥ 2.
        folder: is there already.

    Raises:
        ConfigError: the layout cannot hold this model; every reason is named.
    """
    config = model.base.config
    problems = _config_problems(model, config) + _kept_problems(model)
    tensors, unknown = _tensors(model)
    if not problems and unknown:
        problems = [f"it has no place for {', '.join(unknown)}"]
    if problems:
        raise ConfigError([f"Meta's layout cannot hold this model: {problem}" for problem in problems])
    (folder / "params.json").write_text(json.dumps(_params(model, config), indent=2) + "\n", encoding="utf-8")
    torch.save(tensors, folder / "consolidated.pth")


def _config_problems(model: MTPModel, config: PreTrainedConfig) -> list[str]:
    architecture = type(model.base).__name__
    if architecture != "LlamaForCausalLM":
        return [f"it is for LlamaForCausalLM, and this is a {architecture}"]
    problems = []
    if model.horizon < 2:
        problems.append("it has no extra heads (H = 1), which the layout is for; use --format hf")
    elif model.heads.kind != "block":
        problems.append(f"its extra heads are of kind '{model.heads.kind}', and the layout has decoder layers (kind 'block')")
    rope = dict(config.rope_parameters)
    if rope.get("rope_type", "default") != "default":
        problems.append(f"its positions are scaled (rope_type '{rope['rope_type']}'), for which the layout has no field")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        problems.append("it rotates a part of each attention head only (partial_rotary_factor)")
    if config.hidden_act != "silu":
        problems.append(f"its activation is '{config.hidden_act}', and the layout's is silu")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        problems.append(
            f"its attention heads are {config.head_dim} wide, and the layout's are dim / n_heads = "
            f"{config.hidden_size / config.num_attention_heads:g}"
        )
    return problems


def _kept_problems(model: MTPModel) -> list[str]:
    """Report tensors beside the model's own.

    The frequencies that old Llama folders hold count for nothing: they follow from ``rope_theta``.
    """
    tensors = () if model.untouched is None else model.untouched.tensors
    kept = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]
    return [f"it has no place for what its folder holds besides the model: {', '.join(kept)}"] if kept else []


def _tensors(model: MTPModel) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by Meta's names, and names without an equivalent."""
    head_dim = model.base.config.head_dim
    outside = {theirs: ours for ours, theirs in OUTSIDE_NAMES.items()}
    inside = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    tensors: dict[str, Tensor] = {}
    unknown: list[str] = []
    for group, module in (("layers", model.base), ("extra_heads", model.extra_heads)):
        for name, tensor in module.state_dict().items():
            stem, _, kind = name.removeprefix("model.layers.").rpartition(".")
            index, _, part = stem.partition(".")
            if kind != "weight" or not (stem in outside or part in inside):
                unknown.append(name)
            elif stem in outside:
                tensors[f"{outside[stem]}.weight"] = tensor.detach().cpu().contiguous()
            else:
                value = _neighbours(inside[part], tensor.detach().cpu(), head_dim)
                tensors[f"{group}.{index}.{inside[part]}.weight"] = value.contiguous()
    return tensors, unknown


def _neighbours(part: str, tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder rows of queries and keys from halves to neighbouring pairs.

    transformers rotates the two halves of a head's numbers, Meta neighbouring pairs.
    """
    if part not in ("attention.wq", "attention.wk"):
        return tensor
    rows, dim = tensor.shape
    return tensor.view(rows // head_dim, 2, head_dim // 2, dim).transpose(1, 2).reshape(rows, dim)


def _params(model: MTPModel, config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "dim": config.hidden_size,
        # every head counts: the last layer is head 1
        "n_layers": config.num_hidden_layers + model.horizon - 1,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": model.vocab_size,
        **_width(config.hidden_size, config.intermediate_size),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "n_future_tokens": model.horizon,
        "max_seq_len": config.max_position_embeddings,
    }


def _width(dim: int, ffn: int) -> dict[str, Any]:
    """Solve Meta's formula for ``ffn``.

    It is ``int(8 · dim / 3)`` times the multiplier, rounded up to a multiple.
    """
    plain = int(2 * (4 * dim) / 3)
    multiples = [multiple for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1) if ffn % multiple == 0]
    for multiple in multiples:
        if -(-plain // multiple) * multiple == ffn:
            return {"multiple_of": multiple}
    # half a unit above, so that int() gives ffn whatever the product is rounded to
    return {"multiple_of": multiples[0], "ffn_dim_multiplier": (ffn + 0.5) / plain}

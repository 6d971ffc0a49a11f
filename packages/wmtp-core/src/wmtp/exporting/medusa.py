"""Export of heads 2..H as vLLM's Medusa draft model (arXiv 2401.10774).

vLLM computes ``x + SiLU(W x + b)`` for each layer of a block, then the logits by the head's unembedding, from the model's
hidden states after its final norm: what heads of kind ``residual`` and ``linear`` do. Names and shapes are those of
``vllm/model_executor/models/medusa.py`` and ``vllm/transformers_utils/configs/medusa.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wmtp.errors import ConfigError
from wmtp.models.heads import ResidualBlock
from wmtp.models.mtp import MTPModel

__all__ = ["write_medusa"]


def write_medusa(model: MTPModel, folder: Path) -> None:
    """Write the extra heads as a draft model, without the base.

    Args:
        model: with H ≥ 2 and heads of kind ``residual`` or ``linear``.
        folder: is there already.

    Raises:
        ConfigError: vLLM's draft model cannot hold these heads; every reason is named.
    """
    problems = _problems(model)
    if problems:
        raise ConfigError([f"the medusa layout cannot hold this model's heads: {problem}" for problem in problems])
    shared = model.heads.kind == "residual"
    tensors = _residual(model) if shared else _linear(model)
    config: dict[str, Any] = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "truncated_vocab_size": model.vocab_size,
        "num_heads": model.horizon - 1,
        "num_hidden_layers": 1,
        "medusa_fc_bias": shared,
        "original_lm_head": shared,
        "logit_scale": model.anatomy.scale,
        "torch_dtype": str(model.anatomy.output.weight.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _problems(model: MTPModel) -> list[str]:
    if model.horizon < 2:
        return ["it has no extra heads (H = 1); use --format hf"]
    kind = model.heads.kind
    if kind not in ("residual", "linear"):
        why = (
            "they read the trunk, before the last layer"
            if kind == "block"
            else "each of them reads the token that the one before it predicted"
        )
        return [
            f"they are of kind '{kind}': {why}; a Medusa head reads the last hidden states only (kinds 'residual' and 'linear')"
        ]
    problems = []
    if model.anatomy.output.bias is not None:
        problems.append("its unembedding has a bias")
    if model.anatomy.softcap is not None:
        problems.append("its logits are capped (softcapping)")
    return problems


def _residual(model: MTPModel) -> dict[str, Tensor]:
    # with original_lm_head vLLM takes the first head's unembedding for all of them
    tensors = {"lm_heads.0.weight": model.anatomy.output.weight}
    for index, head in enumerate(model.extra_heads):
        linear = cast(ResidualBlock, head).linear
        tensors[f"blocks.{index}.layers.0.weight"] = linear.weight
        tensors[f"blocks.{index}.layers.0.bias"] = linear.bias
    return tensors


def _linear(model: MTPModel) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, head in enumerate(model.extra_heads):
        weight = cast(nn.Linear, head).weight
        # W = 0 is the identity: x + SiLU(0) = x
        tensors[f"blocks.{index}.layers.0.weight"] = torch.zeros(model.hidden_size, model.hidden_size, dtype=weight.dtype)
        tensors[f"lm_heads.{index}.weight"] = weight
    return tensors

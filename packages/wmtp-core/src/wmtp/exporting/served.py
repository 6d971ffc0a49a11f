"""Writes a model with one chained head as a server reads a model with a layer of its own: in MiMo-7B's layout.

vLLM and SGLang load that layout as a Qwen2 with one layer for multi-token prediction, which is again a Qwen2 layer. A Llama
fits: the biases that it lacks are written as zeros. Names are those of vLLM's ``models/mimo.py`` and ``models/mimo_mtp.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from attrs import evolve
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from wmtp.errors import ConfigError
from wmtp.models.chains import ChainedBlock
from wmtp.models.loaders.shards import Shards
from wmtp.models.mtp import MTPModel
from wmtp.models.native.layouts import layout_named
from wmtp.models.saving import write_base
from wmtp.models.untouched import Untouched

__all__ = ["write_served"]

_FITTING = ("LlamaForCausalLM", "Qwen2ForCausalLM")
#: fields of a Qwen2's config that a Llama's has too
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_BIASED = ("q_proj", "k_proj", "v_proj")


def write_served(model: MTPModel, folder: Path) -> None:
    """Write a folder that vLLM and SGLang serve with the head as its draft model.

    Args:
        model: with a ``shared`` head, or a ``chained`` one and H = 2.
        folder: is there already.

    Raises:
        ConfigError: the layout cannot hold this model; every reason is named.
        WMTPError: it could not be written in full.
    """
    if problems := [*_head_problems(model), *_base_problems(model)]:
        raise ConfigError([f"the served layout cannot hold this model: {problem}" for problem in problems])
    config = _config(model.base.config)
    with torch.device("meta"):
        base = Qwen2ForCausalLM(config)
    state = _with_biases(dict(model.base.state_dict()))
    base.load_state_dict(state, assign=True)
    base.tie_weights()
    base.generation_config = model.base.generation_config  # type: ignore[assignment]
    content = config.to_diff_dict() | {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
    }
    origin = None if model.untouched is None else model.untouched.shards
    # a tied unembedding is not written twice: servers expect none
    shards = Shards(files={}, types={}, sizes={}) if origin is None else evolve(origin, tied={})
    untouched = Untouched(source=folder, config=content, shards=shards)
    write_base(base, folder, untouched=untouched, added=_head_tensors(cast(ChainedBlock, model.extra_heads[0])))


def _head_problems(model: MTPModel) -> list[str]:
    heads = model.heads
    if heads.horizon < 2:
        return ["it has no extra heads (H = 1); use --format hf"]
    if heads.kind == "native":
        return ["its heads are the model's own layers already, which --format hf writes as servers read them"]
    if heads.kind not in ("shared", "chained"):
        return [
            f"its heads are of kind '{heads.kind}', which no current server reads; train heads of kind 'shared', or for an old "
            "vLLM see --format medusa"
        ]
    problems = []
    if heads.kind == "chained" and heads.horizon > 2:
        problems.append(
            f"it has {heads.horizon - 1} chained modules, and vLLM's loader of this layout takes one; train kind 'shared', or "
            "'chained' with horizon = 2"
        )
    if heads.layout != "mimo":
        problems.append(
            f'its heads were trained with layout = "{heads.layout}", and a server feeds them otherwise; train them with '
            'layout = "mimo"'
        )
    return problems


def _base_problems(model: MTPModel) -> list[str]:
    architecture, config = type(model.base).__name__, model.base.config
    if architecture.startswith("Qwen3"):
        return [
            f"it is a {architecture}: the norms of its queries and keys have no place in the layout, whose layers are Qwen2's"
        ]
    if architecture not in _FITTING:
        return [f"it is a {architecture}, and the layout's layers are those of {' and '.join(_FITTING)}"]
    problems = []
    if architecture == "LlamaForCausalLM" and config.attention_bias:
        problems.append("its attention's output has a bias")
    if getattr(config, "mlp_bias", False):
        problems.append("its feed-forward layers have biases")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        problems.append("its attention has a sliding window")
    if model.anatomy.output.bias is not None:
        problems.append("its unembedding has a bias")
    kept = () if model.untouched is None else model.untouched.tensors
    if others := [name for name in kept if not name.endswith("rotary_emb.inv_freq")]:
        problems.append(f"there is no place for what its folder holds besides the model: {', '.join(others)}")
    return problems


def _config(config: PreTrainedConfig) -> Qwen2Config:
    fields: dict[str, Any] = {name: getattr(config, name) for name in _FIELDS}
    # no field of a Qwen2's config, but what its layers go by
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Qwen2Config(**fields, use_sliding_window=False, attention_dropout=0.0)


def _head_tensors(head: ChainedBlock) -> dict[str, Tensor]:
    layout = layout_named("mimo")
    parts = {
        "embedding_norm": layout.embedding_norm,
        "hidden_norm": layout.hidden_norm,
        "projection": layout.projection,
        "output_norm": layout.output_norm,
    }
    state = head.state_dict()
    tensors = {f"{(name or '').format(i=0)}.weight": state[f"{part}.weight"] for part, name in parts.items()}
    layer = {name.removeprefix("layer."): tensor for name, tensor in state.items() if name.startswith("layer.")}
    return tensors | {f"{layout.layer.format(i=0)}{name}": tensor for name, tensor in _with_biases(layer).items()}


def _with_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the biases of queries, keys and values that a Llama does without."""
    added: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and stem.endswith(_BIASED) and f"{stem}.bias" not in state:
            added[f"{stem}.bias"] = tensor.new_zeros(len(tensor))
    return state | added

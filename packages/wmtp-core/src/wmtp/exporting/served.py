"""Export of a model with one chained head for vLLM and SGLang.

These servers know models with a layer for multi-token prediction by the model's name, so a plain model is written as one of
those that computes the same. A Llama, Mistral, Phi-3 or Qwen2 becomes a MiMo-7B: a Qwen2 with one more layer, the biases that a
Llama lacks being zeros, and the maps that a Phi-3 joins apart (vLLM: ``models/mimo.py``, ``models/mimo_mtp.py``). A Qwen3
becomes a K-EXAONE without experts, whose layers norm queries and keys as Qwen3's do (``models/exaone_moe.py``,
``models/exaone_moe_mtp.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import torch
from attrs import evolve, frozen
from torch import Tensor
from transformers import (
    ExaoneMoeConfig,
    ExaoneMoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from wmtp.errors import ConfigError
from wmtp.exporting.refused import REFUSED
from wmtp.models.chains import ChainedBlock
from wmtp.models.loaders.shards import Shards
from wmtp.models.mtp import MTPModel
from wmtp.models.native.layouts import SERVED, layout_named
from wmtp.models.saving import write_base
from wmtp.models.untouched import Untouched

__all__ = ["write_served"]

#: fields of the written config that all these models' configs have
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
_GATED = ("gate_proj", "up_proj")


@frozen(kw_only=True)
class _Written:
    """One of the models that servers know.

    Args:
        model: transformers' class of its base.
        config: makes its config from that of the model.
        marks: what its ``config.json`` says besides, by which servers know it.
        state: completes a state dict, or a part of one, of a model with such a config.
        any_head_width: heads may have any width; else that of the hidden states over their number.
    """

    model: type[PreTrainedModel]
    config: Callable[[PreTrainedConfig], PreTrainedConfig]
    marks: Callable[[PreTrainedConfig], dict[str, Any]]
    state: Callable[[dict[str, Tensor], PreTrainedConfig], dict[str, Tensor]]
    any_head_width: bool


def write_served(model: MTPModel, folder: Path) -> str:
    """Write a folder that vLLM and SGLang serve with its draft head.

    Args:
        model: with a ``shared`` head, or a ``chained`` one and H = 2.
        folder: is there already.

    Returns:
        the layout's name.

    Raises:
        ConfigError: no layout can hold this model; every reason is named.
        WMTPError: it could not be written in full.
    """
    if problems := [*_head_problems(model), *_base_problems(model)]:
        raise ConfigError([f"no layout that servers read can hold this model: {problem}" for problem in problems])
    name = SERVED[type(model.base).__name__]
    written = _WRITTEN[name]
    config = written.config(model.base.config)
    with torch.device("meta"):
        base = written.model(config)
    base.load_state_dict(written.state(dict(model.base.state_dict()), config), assign=True)
    base.tie_weights()
    base.generation_config = model.base.generation_config  # type: ignore[assignment]
    content = config.to_diff_dict() | {layout_named(name).key: 1} | written.marks(config)
    origin = None if model.untouched is None else model.untouched.shards
    # a tied unembedding is not written twice: servers expect none
    shards = Shards(files={}, types={}, sizes={}) if origin is None else evolve(origin, tied={})
    untouched = Untouched(source=folder, config=content, shards=shards)
    head = _head_tensors(cast(ChainedBlock, model.extra_heads[0]), name, config)
    write_base(base, folder, untouched=untouched, added=head)
    return name


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
            f"it has {heads.horizon - 1} chained modules, and the loaders of these layouts take one; train kind 'shared', or "
            "'chained' with horizon = 2"
        )
    served = SERVED.get(type(model.base).__name__)
    if served is not None and heads.layout != served:
        problems.append(
            f'its heads were trained with layout = "{heads.layout}", and a server feeds them otherwise; train them with '
            f'layout = "{served}"'
        )
    return problems


def _base_problems(model: MTPModel) -> list[str]:
    architecture, config = type(model.base).__name__, model.base.config
    if architecture not in SERVED:
        why = f": {REFUSED[architecture]}" if architecture in REFUSED else ""
        return [f"it is a {architecture}, and they hold {', '.join(SERVED)}{why}"]
    problems = []
    if architecture != "Qwen2ForCausalLM" and getattr(config, "attention_bias", False):
        problems.append("its attention's output has a bias")
    if getattr(config, "mlp_bias", False):
        problems.append("its feed-forward layers have biases")
    if config.hidden_act != "silu":
        problems.append(f"its activation is '{config.hidden_act}', and servers compute silu")
    if _has_window(config):
        problems.append("its attention has a sliding window")
    width = _head_width(config)
    if not _WRITTEN[SERVED[architecture]].any_head_width and width * config.num_attention_heads != config.hidden_size:
        problems.append(
            f"its heads are {width} wide, which is not its hidden size over their number, and vLLM's Qwen2 takes no other"
        )
    rope = config.rope_parameters or {}
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append(f"it turns {part:.0%} of each head by position, and servers turn the whole")
    if rope.get("rope_type") == "longrope":
        problems.append("its positions are scaled by longrope, whose factors servers read in a Phi-3's config alone")
    if model.anatomy.output.bias is not None:
        problems.append("its unembedding has a bias")
    kept = () if model.untouched is None else model.untouched.tensors
    if others := [name for name in kept if not name.endswith("rotary_emb.inv_freq")]:
        problems.append(f"there is no place for what its folder holds besides the model: {', '.join(others)}")
    return problems


def _has_window(config: PreTrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) is not None  # Mistral's, of every layer


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(config, name) for name in _FIELDS}
    fields["head_dim"] = _head_width(config)  # no field of these configs' own, but what their layers go by
    return fields | {"attention_dropout": 0.0}


def _head_width(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _as_qwen2(config: PreTrainedConfig) -> Qwen2Config:
    return Qwen2Config(**_fields(config), use_sliding_window=False)


def _as_exaone(config: PreTrainedConfig) -> ExaoneMoeConfig:
    """Make a config whose layers rotate queries and keys.

    K-EXAONE's do so where they have a window; this window holds every token.
    """
    layers = config.num_hidden_layers
    return ExaoneMoeConfig(
        **_fields(config),
        layer_types=["sliding_attention"] * layers,
        sliding_window=config.max_position_embeddings,
        mlp_layer_types=["dense"] * layers,
        first_k_dense_replace=layers,
    )


def _head_tensors(head: ChainedBlock, name: str, config: PreTrainedConfig) -> dict[str, Tensor]:
    layout = layout_named(name)
    parts = {
        "embedding_norm": layout.embedding_norm,
        "hidden_norm": layout.hidden_norm,
        "projection": layout.projection,
        "output_norm": layout.output_norm,
    }
    state = head.state_dict()
    tensors = {f"{(name or '').format(i=0)}.weight": state[f"{part}.weight"] for part, name in parts.items()}
    layer = {name.removeprefix("layer."): tensor for name, tensor in state.items() if name.startswith("layer.")}
    return tensors | {
        f"{layout.layer.format(i=0)}{name}": tensor for name, tensor in _WRITTEN[name].state(layer, config).items()
    }


def _as_qwen2_state(joined: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """Split a Phi-3's joined maps, and add a Llama's missing biases.

    The biases are those of queries, keys and values.
    """
    rows = [heads * _head_width(config) for heads in (config.num_attention_heads, *(config.num_key_value_heads,) * 2)]
    state: dict[str, Tensor] = {}
    for name, tensor in joined.items():
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        if part == "qkv_proj":
            state |= {f"{stem}.{own}.weight": rest for own, rest in zip(_BIASED, tensor.split(rows), strict=True)}
        elif part == "gate_up_proj":
            state |= {f"{stem}.{own}.weight": rest for own, rest in zip(_GATED, tensor.chunk(2), strict=True)}
        else:
            state[name] = tensor
    added: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and stem.endswith(_BIASED) and f"{stem}.bias" not in state:
            added[f"{stem}.bias"] = tensor.new_zeros(len(tensor))
    return state | added


#: by layout
_WRITTEN: Final = {
    "mimo": _Written(
        model=Qwen2ForCausalLM,
        config=_as_qwen2,
        marks=lambda _: {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2"},
        state=_as_qwen2_state,
        any_head_width=False,
    ),
    "exaone": _Written(
        model=ExaoneMoeForCausalLM,
        config=_as_exaone,
        # SGLang 0.5.23 goes by the last, a field of the model's first config
        marks=lambda config: {"architectures": ["ExaoneMoeForCausalLM"], "is_moe_layer": [False] * config.num_hidden_layers},
        state=lambda state, _: state,
        any_head_width=True,
    ),
}

"""Tiny configs of transformers' causal models, derived from their defaults."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

__all__ = ["tiny_config"]

VOCAB = 97
#: decoder layers, where the kinds of layer of an architecture do not ask for more
LAYERS = 3

#: field of a config → its small value
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "attention_hidden_size", "embedding_dim", "emb_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "shared_expert_intermediate_size", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("dense_intermediate_size", "moe_shared_expert_intermediate_size", "dim_ff", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "moe_latent_size"), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads", "num_linear_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("num_global_key_value_heads", "linear_num_key_heads", "n_mamba_heads", "num_attention_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "index_n_heads", "indexer_n_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim", "linear_head_dim", "dim_head"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_size", "mamba_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "d_kv", "index_head_dim", "indexer_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank", "hc_lowrank", "laurel_rank"), 16),
    **dict.fromkeys(("router_hidden_size", "loop_gate_rank", "time_step_rank", "mamba_dt_rank", "gated_norm_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(
        ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size", "sliding_window_size"), 8
    ),
    **dict.fromkeys(("index_topk", "keep_window_size", "local_attention_window_len"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_d_head",), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "model_max_length", "max_seq_len"), 256),
    **dict.fromkeys(("max_sequence_length", "context_length", "seq_length", "max_target_positions"), 256),
    **dict.fromkeys(("hidden_size_per_layer_input", "rotary_dim", "lru_width"), 8),
    **dict.fromkeys(("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    "lru_width": 32,
    "altup_num_inputs": 2,
    "query_pre_attn_scalar": 8,
}
#: ids that no test text has
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks")
#: what the defaults do not tell: fields of single architectures
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "ctrl": {"dff": 48},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    # the base of its positions is in the published file, and no field of transformers' config
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_text": {"num_global_key_value_heads": 2, "global_head_dim": 16},
    "gemma4_unified_text": {"num_global_key_value_heads": 2, "global_head_dim": 16},
    "gemma4_assistant": {"_default": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}},
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {"shape_vocab_size": 30, "pronunciation_vocab_size": 30, "shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "xlnet": {"d_inner": 48},
    # their attention is over the hidden state and the embedding, side by side
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "mamba_headdim": 32},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Make a config with few and narrow layers.

    It has every kind of layer that the architecture has by default.

    Args:
        model_type: transformers' name of the architecture.

    Raises:
        Exception: the architecture's own, where no small one was found.
    """
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_small_fields(config_class, model_type))


def _small_fields(config_class: type[PreTrainedConfig], model_type: str) -> dict[str, Any]:
    own = _OWN.get(model_type, {})
    default = config_class(**own.get("_default", {}))
    names = set(inspect.signature(config_class.__init__).parameters) | set(vars(default)) | set(config_class.attribute_map)
    fields: dict[str, Any] = {}
    for name in names:
        if name in _SMALL and vars(default).get(name) is not None:
            fields[name] = _SMALL[name]
        elif name.endswith("_token_id"):
            fields[name] = _SPECIAL.get(name, VOCAB - 1)
    count_name = next((name for name in _LAYER_COUNTS if name in names), None)
    if count_name is not None:
        count = getattr(default, count_name)
        picked = _picked_layers(default, count)
        for name in _LAYER_COUNTS:
            if name in names:
                fields[name] = len(picked)
        for name, value in vars(default).items():
            if isinstance(value, list) and len(value) == count and count > 1:
                fields[name.removeprefix("_")] = [value[place] for place in picked]
    if fields.get("kv_lora_rank"):  # latent attention has a key for each query
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name, part in vars(default).items():
        if isinstance(part, PreTrainedConfig):
            fields[name] = {**_small_fields(type(part), part.model_type), "model_type": part.model_type}
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    fields |= {name: value for name, value in own.items() if not name.startswith("_")}
    return {name: value for name, value in fields.items() if name not in own.get("_without", ())}


def _picked_layers(default: PreTrainedConfig, count: int) -> list[int]:
    """Choose layers of each kind, the last one last."""
    lists = [value for value in vars(default).values() if isinstance(value, list) and len(value) == count and count > 1]
    kinds = [tuple(str(values[place]) for values in lists) for place in range(count)]
    firsts = sorted({kind: place for place, kind in reversed(list(enumerate(kinds)))}.values())[:6]
    picked = sorted({*firsts, count - 1} - {-1})
    if not lists:
        return list(range(LAYERS))
    while len(picked) < LAYERS:
        picked = sorted([*picked, picked[0]])
    return picked

"""Prompts of decoding through layers by our own kernels.

Where steps of decoding have them (`wmtp.models.layer_steps`), a prompt of one text has too: norm, queries, keys, values and
their rotation are one kernel, norm and gate another. The rest is torch's, whose products are as fast.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward

from wmtp.models.layer_steps import is_plain_layer, norm_of
from wmtp.models.step_cache import LayeredCache

__all__ = ["prompt_of"]

#: tokens of a prompt: fewer are a step's, more were not measured
_FEWEST: Final = 7
_MOST: Final = 512

#: largest hidden size, and size of a gate: torch's products are faster the larger they are
_MOST_HIDDEN: Final = 768
_MOST_BETWEEN: Final = 2048

#: sizes are multiples of it, since tiles divide them
_PIECE: Final = 64


def prompt_of(layer: nn.Module, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs a layer with a prompt's tokens.

    Args:
        layer: a decoder layer.
        otherwise: runs it where the kernels do not fit.
    """
    if type(layer) is not LlamaDecoderLayer or importlib.util.find_spec("triton") is None:
        return otherwise
    return partial(_run, layer, otherwise)


def _run(layer: LlamaDecoderLayer, otherwise: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    x = args[0] if args else kwargs.get("hidden_states")
    cache = next((value for value in kwargs.values() if isinstance(value, LayeredCache)), None)
    if not isinstance(x, Tensor) or len(args) > 1 or cache is None or not _fits(layer, x, kwargs):
        return otherwise(*args, **kwargs)
    from wmtp.models.prompt_kernels import gate, project

    attention, mlp = layer.self_attn, layer.mlp
    weights = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    query, *new = project(x, norm_of(layer.input_layernorm), weights, kwargs["position_embeddings"], attention.head_dim)
    keys, values = cache.update(*new, attention.layer_idx)  # type: ignore[attr-defined]
    kernel: str = attention.config._attn_implementation  # type: ignore[assignment]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager_attention_forward)
    seen, _ = attend(attention, query, keys, values, kwargs["attention_mask"], dropout=0.0, scaling=attention.scaling)
    x = x + attention.o_proj(seen.reshape(*x.shape[:2], -1))
    return x + mlp.down_proj(gate(x, norm_of(layer.post_attention_layernorm), mlp.gate_proj.weight, mlp.up_proj.weight))


def _fits(layer: LlamaDecoderLayer, x: Tensor, given: dict[str, Any]) -> bool:
    mask, turn = given.get("attention_mask"), given.get("position_embeddings")
    if len(x) > 1 or not _FEWEST <= x.shape[1] <= _MOST or not x.is_contiguous() or not is_plain_layer(layer, x):
        return False
    if not isinstance(mask, Tensor) or not isinstance(turn, tuple):
        return False
    hidden, between, d = x.shape[-1], layer.mlp.gate_proj.out_features, layer.self_attn.head_dim
    turned = all(angle.shape == (*x.shape[:2], d) and angle.is_contiguous() and angle.dtype == x.dtype for angle in turn)
    sizes = hidden <= _MOST_HIDDEN and between <= _MOST_BETWEEN and not (hidden % _PIECE or between % _PIECE)
    return turned and sizes and d in (64, 128)

"""Steps of decoding through layers by our own kernels.

A rule says where, so that a model computes the same each time: Llama's own layers, and chains of them, for the few tokens of
one text, in fp32 on an NVIDIA Hopper GPU, of sizes like those that were measured (SmolLM2-135M). Everything else is compiled
code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from wmtp.models.anatomy import Anatomy, LayerCall
from wmtp.models.chains import ChainedBlock
from wmtp.models.step_cache import LayerPart

if TYPE_CHECKING:
    from wmtp.loss import Unembedding

__all__ = [
    "begins_by_kernel",
    "block_step",
    "chooses_by_kernel",
    "has_known_parts",
    "is_plain_layer",
    "is_table",
    "norm_of",
    "step_of",
]

#: most tokens of a text: those that a step of decoding reads, and those that a chain of four heads goes over
_MOST_TOKENS: Final = 6

#: largest hidden size, and size between a gate and what follows it: a program holds rows of the weights in registers
_MOST_HIDDEN: Final = 768
_MOST_BETWEEN: Final = 2048

#: most slots of the cache: a program goes along all of a query's, so 440 take longer than 200; compiled code divides long rows
_MOST_SLOTS: Final = 512

#: numbers that a program reads at a time; sizes are multiples of it
_PIECE: Final = 64

#: kinds of angles that depend on a token's position alone
_FIXED_ANGLES: Final = ("default", "linear", "llama3", "yarn")


def step_of(layer: nn.Module, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs a layer in a step of decoding.

    Args:
        layer: a decoder layer, or a chain's module.
        otherwise: runs it where the kernels do not fit.
    """
    if importlib.util.find_spec("triton") is None:
        return otherwise
    if type(layer) is ChainedBlock:
        return partial(_run_block, layer, otherwise)
    return partial(_run_layer, layer, otherwise) if type(layer) is LlamaDecoderLayer else otherwise


def chooses_by_kernel(unembedding: Unembedding, hidden: Tensor) -> bool:
    """Tell whether a choice's kernels fit hidden states ``[B, T, D]``."""
    weight, width = unembedding.weight, hidden.shape[-1]
    plain = unembedding.bias is None and unembedding.scale == 1.0 and unembedding.softcap is None
    if not plain or importlib.util.find_spec("triton") is None or not _on_hopper(hidden) or len(hidden) > 1:
        return False
    few = hidden.numel() <= _MOST_TOKENS * width and width <= _MOST_HIDDEN and not (width % _PIECE or len(weight) % _PIECE)
    known = type(weight) in (Tensor, nn.Parameter) and weight.dtype == hidden.dtype and weight.device == hidden.device
    return few and known and weight.is_contiguous() and hidden.is_contiguous()


def begins_by_kernel(anatomy: Anatomy, tokens: int, slots: int) -> bool:
    """Tell whether kernels fit what comes before and after a decoder's layers.

    Args:
        anatomy: of the model.
        tokens: of a step.
        slots: of the cache.
    """
    decoder, embedding = anatomy.decoder, anatomy.embedding
    if type(decoder) is not LlamaModel or importlib.util.find_spec("triton") is None:
        return False
    angles = decoder.rotary_emb
    fixed = type(angles) is LlamaRotaryEmbedding and angles.rope_type in _FIXED_ANGLES
    # compiled, angles and the norm have a forward of their own
    changed = "forward" in vars(decoder) or _have_hooks([decoder, decoder.norm, angles])
    known = embedding is decoder.embed_tokens and anatomy.tail == (decoder.norm,) and type(decoder.norm) is LlamaRMSNorm
    few = tokens <= _MOST_TOKENS and slots <= _MOST_SLOTS and anatomy.hidden_size <= _MOST_HIDDEN
    return known and few and fixed and not changed and is_table(embedding)


def is_table(embedding: nn.Embedding) -> bool:
    """Tell whether a kernel can read an embedding: nothing watches it."""
    weight = embedding.weight
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and type(weight) is nn.Parameter
    if not plain or _are_watched([embedding]):
        return False
    return weight.is_contiguous() and not weight.shape[1] % _PIECE and _on_hopper(weight)


def block_step(block: ChainedBlock, tokens: int, call: LayerCall, *, last: bool) -> Callable[[Tensor], Tensor] | None:
    """Return what runs a chain's layer; None: the kernels do not fit.

    Args:
        block: the module.
        tokens: that it will be given, after the projection.
        call: of the layer, with its part of the cache.
        last: whether the last token's result alone is wanted.
    """
    part = _part(call.kwargs)
    if part is None or call.args or _have_hooks([block]):
        return None
    x = part.keys.new_empty(1, tokens, block.projection.out_features)
    if not _fits_block(block, x, x) or not _fits(block.layer, x, call.kwargs):
        return None
    return partial(_layer, cast("LlamaDecoderLayer", block.layer), given=call.kwargs, last=last)


def has_known_parts(decoder: nn.Module) -> bool:
    """Tell whether a step's masks and angles are compiled too."""
    return type(decoder) is LlamaModel


def _run_layer(layer: LlamaDecoderLayer, otherwise: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or len(args) > 1 or not _fits(layer, x, kwargs):
        return otherwise(*args, **kwargs)
    return _layer(layer, x, kwargs)


def _run_block(block: ChainedBlock, otherwise: Callable[..., Any], previous: Tensor, embedding: Tensor, call: LayerCall) -> Any:
    if not _fits_block(block, previous, embedding) or len(call.args) > 1 or not _fits(block.layer, previous, call.kwargs):
        return otherwise(previous, embedding, call)
    from wmtp.models.head_kernels import join, normalize

    parts = [(previous, norm_of(block.hidden_norm)), (embedding, norm_of(block.embedding_norm))]
    first, second = parts[::-1] if block.rule.embedding_first else parts
    x = join(*first, *second, block.projection.weight)
    x = _layer(cast("LlamaDecoderLayer", block.layer), x, call.kwargs)
    return x if block.output_norm is None else normalize(x, norm_of(block.output_norm))


def _layer(layer: LlamaDecoderLayer, x: Tensor, given: dict[str, Any], *, last: bool = False) -> Tensor:
    """Run a layer.

    Args:
        layer: Llama's own.
        x: ``[1, T, D]``.
        given: its other arguments.
        last: whether the last token's result alone is wanted, ``[1, 1, D]``.
    """
    from wmtp.models.attention_kernels import attend
    from wmtp.models.layer_kernels import gate, multiply, project

    attention, mlp, part = layer.self_attn, layer.mlp, _part(given)
    assert part is not None, "asked before: only layers with a cache run so"
    slots, cache = part.slots.contiguous(), (part.keys, part.values)
    weights = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    query = project(x, norm_of(layer.input_layernorm), weights, given["position_embeddings"], slots, cache)
    seen = attend(query, cache, given["attention_mask"], slots, attention.scaling)
    if last:  # keys and values of all are in the cache
        seen, x = seen[:, -1:], x[:, -1:]
    x = multiply(seen, attention.o_proj.weight, x)
    between = gate(x, norm_of(layer.post_attention_layernorm), mlp.gate_proj.weight, mlp.up_proj.weight)
    return multiply(between, mlp.down_proj.weight, x)


def _fits(layer: nn.Module, x: Tensor, given: dict[str, Any]) -> bool:
    """Tell whether the kernels fit a layer's call."""
    part, mask, turn = _part(given), given.get("attention_mask"), given.get("position_embeddings")
    if not _on_hopper(x) or x.numel() > _MOST_TOKENS * x.shape[-1] or torch.is_grad_enabled() or part is None:
        return False
    if not isinstance(mask, Tensor) or not isinstance(turn, tuple) or not _is_plain(layer, x) or len(x) > 1:
        return False
    plain = cast("LlamaDecoderLayer", layer)
    rows, tokens, hidden = x.shape
    between, d = plain.mlp.gate_proj.out_features, part.keys.shape[-1]
    sizes = hidden <= _MOST_HIDDEN and between <= _MOST_BETWEEN and not (hidden % _PIECE or between % _PIECE)
    heads = d in (64, 128) and plain.self_attn.head_dim == d == part.values.shape[-1]
    turned = all(angle.shape == (rows, tokens, d) and angle.is_contiguous() and angle.dtype == x.dtype for angle in turn)
    cached = all(kept.is_contiguous() and kept.dtype == x.dtype for kept in (part.keys, part.values))
    masked = mask.is_floating_point() and mask.shape[:3] == (rows, 1, tokens) and mask.shape[3] <= _MOST_SLOTS
    placed = part.slots.shape == (rows, tokens)
    return x.is_contiguous() and sizes and heads and turned and cached and placed and masked and mask.stride(-1) == 1


def _fits_block(block: ChainedBlock, previous: Tensor, embedding: Tensor) -> bool:
    norms = [block.hidden_norm, block.embedding_norm, *([] if block.output_norm is None else [block.output_norm])]
    same = previous.shape == embedding.shape and previous.dtype == embedding.dtype
    plain = all(type(norm) is LlamaRMSNorm for norm in norms) and _are_linear([block.projection], previous)
    watched = _are_watched([*norms, block.projection, block.layer])
    return plain and not watched and same and previous.is_contiguous() and embedding.is_contiguous()


def is_plain_layer(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether kernels may compute a layer's call without gradients.

    They were measured on the device, the layer is Llama's own, and nothing watches its parts.
    """
    return _on_hopper(x) and not torch.is_grad_enabled() and _is_plain(layer, x)


def _is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether a layer is Llama's own, and nothing watches its parts."""
    if type(layer) is not LlamaDecoderLayer or type(layer.self_attn) is not LlamaAttention or type(layer.mlp) is not LlamaMLP:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = layer.input_layernorm, layer.post_attention_layernorm
    parts = [*linear, *norms, attention, mlp, mlp.act_fn]
    is_silu = isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation"
    return not _are_watched(parts) and is_silu and all(type(norm) is LlamaRMSNorm for norm in norms) and _are_linear(linear, x)


def _are_watched(parts: list[nn.Module]) -> bool:
    """Tell whether modules have hooks, or another forward than their class."""
    return _have_hooks(parts) or any("forward" in vars(part) for part in parts)


def _have_hooks(parts: list[nn.Module]) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def _are_linear(parts: list[nn.Linear], x: Tensor) -> bool:
    weights = [part.weight for part in parts if type(part) is nn.Linear and part.bias is None]
    return len(weights) == len(parts) and all(
        type(weight) is nn.Parameter and weight.is_contiguous() and weight.dtype == x.dtype and weight.device == x.device
        for weight in weights
    )


def norm_of(norm: nn.Module) -> tuple[Tensor, float]:
    """Return the weight and epsilon of an RMS norm."""
    return norm.weight, norm.variance_epsilon  # type: ignore[return-value]


def _part(given: dict[str, Any]) -> LayerPart | None:
    return next((value for value in given.values() if isinstance(value, LayerPart)), None)


def _on_hopper(x: Tensor) -> bool:
    """Tell whether the kernels were measured on this device and precision.

    Triton launches on the current device alone.
    """
    if not x.is_cuda or x.dtype != torch.float32 or torch.version.hip is not None or torch.is_autocast_enabled("cuda"):
        return False
    return x.device.index == torch.cuda.current_device() and torch.cuda.get_device_capability(x.device)[0] == 9

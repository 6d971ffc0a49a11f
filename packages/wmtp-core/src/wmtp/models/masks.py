"""Attention masks as architectures take them.

One for all layers, or one for each kind of layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from wmtp.models.config_fields import field, layer_kinds

__all__ = ["attending_layers", "attention_masks", "reads_masks"]

#: layers that read no mask of tokens by tokens
_WITHOUT_MASK = frozenset({"linear_attention", "conv", "mamba", "recurrent"})


def reads_masks(config: PreTrainedConfig) -> bool:
    """Tell whether any layer of a model attends."""
    return not set(layer_kinds(config)) <= _WITHOUT_MASK


def attending_layers(config: PreTrainedConfig) -> int:
    """Count the layers that attend.

    Each has keys and values of its own.
    """
    return sum(kind not in _WITHOUT_MASK for kind in layer_kinds(config))


def attention_masks(
    config: PreTrainedConfig, query: Tensor, key: Tensor, same: Tensor | None, dtype: torch.dtype
) -> Tensor | dict[str, Tensor | None]:
    """Build a model's causal masks, with their windows and chunks.

    Args:
        config: of the model.
        query: ``[B, T]``, the positions of the tokens that look.
        key: ``[B, K]``, those of the tokens that are looked at.
        same: ``[B, T, K]``, whether both are of one document; None: all are.
        dtype: of the model's hidden states.

    Returns:
        ``[B, 1, T, K]``: True where a token is seen; for eager attention numbers that are added to its scores. A dict of them
        by transformers' names of kinds of layers, where an architecture has several.
    """
    query, key = query[:, :, None], key[:, None, :]
    causal = key <= query if same is None else (key <= query) & same

    def finished(mask: Tensor) -> Tensor:
        mask = mask[:, None]
        if field(config, "_attn_implementation", "eager") != "eager":
            return mask
        return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)

    window, chunk = field(config, "sliding_window"), field(config, "attention_chunk_size")
    masks: dict[str, Tensor | None] = dict.fromkeys(_WITHOUT_MASK, None)
    masks["full_attention"] = finished(causal)
    if window:
        masks["sliding_attention"] = finished(causal & (query - key < window))
    if chunk:
        masks["chunked_attention"] = finished(causal & (query // chunk == key // chunk))
    kinds = set(layer_kinds(config)) - _WITHOUT_MASK
    for kind in kinds - masks.keys():
        masks[kind] = masks["full_attention"]
    if len(kinds) > 1:
        return masks
    only = masks[kinds.pop() if kinds else "full_attention"]
    assert only is not None, "a kind of layer that takes a mask has one"
    return only

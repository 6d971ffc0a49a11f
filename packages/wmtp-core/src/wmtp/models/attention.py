"""Attention that separates packed documents without computing masked blocks.

transformers hands a layer's mask to whatever attention function is registered with it. Ours takes two masks of its own beside
those of transformers: `document_mask`, which flex attention computes block by block, and `causal_mask`, which says that there
is nothing to mask but the future. Both are known without asking the device anything, which transformers' own are not.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from wmtp.models.anatomy import Anatomy, evaluating
from wmtp.models.config_fields import field, text_config
from wmtp.models.fp8 import products_in_bf16

__all__ = ["BLOCK", "attend", "causal_mask", "document_mask", "same_attention", "use_block_attention"]

_NAME = "wmtp"
#: tokens of a block that is computed or left out as a whole
BLOCK = 128
#: tokens of a row up to which decoding looks at its cache in the form for few
_FEW = 16


def document_mask(position_ids: Tensor) -> BlockMask:
    """Causal attention inside each document.

    Args:
        position_ids: ``[B, S]``, the place of each token in its document, from 0. Every 0 begins a document.

    Returns:
        what a layer takes as its mask.
    """
    document = (position_ids == 0).cumsum(dim=1)
    rows, length = document.shape
    count = -(-length // BLOCK)
    # Numbers of documents only rise along a row, so the first and the last of each block say all. What is beyond the row's end
    # counts as another document.
    padded = torch.nn.functional.pad(document, (0, count * BLOCK - length), value=length + 1)
    blocks = padded.view(rows, count, BLOCK)
    first, last = blocks[..., 0], blocks[..., -1]
    place = torch.arange(count, device=document.device)
    before = place.unsqueeze(1) > place
    # whole: one document from the key block's start to the query block's end
    whole = before & (first.unsqueeze(1) == last.unsqueeze(2))
    some = (before | (place.unsqueeze(1) == place)) & (last.unsqueeze(1) >= first.unsqueeze(2)) & ~whole

    def same_document(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    return BlockMask.from_kv_blocks(
        *_listed(some), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=same_document, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """List the key blocks of each query block.

    Returns:
        their counts ``[B, 1, count]`` and their indices ``[B, 1, count, count]``.
    """
    chosen = blocks.unsqueeze(1).to(torch.int32)
    return chosen.sum(dim=-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def causal_mask(device: torch.device) -> Tensor:
    """Return an empty mask: the marker of single-document rows.

    No architecture reads it.
    """
    return torch.empty((0, 0, 0, 0), dtype=torch.bool, device=device)


def use_block_attention(anatomy: Anatomy) -> bool:
    """Switch a model to our attention function where results agree.

    Left as they are: models whose attention is not torch's scaled dot product (because the config or the architecture says
    so), those with windows or chunks, and those that a trial on a few tokens shows to do something else with a mask.

    Returns:
        whether it does now.
    """
    if text_config(anatomy.decoder.config)._attn_implementation != "sdpa":
        return False
    return _change(anatomy, _NAME, causal_mask, document_mask)


def same_attention(anatomy: Anatomy, name: str) -> bool:
    """Switch a model to a registered attention function where results agree.

    The function takes transformers' own masks.

    Args:
        anatomy: of the model.
        name: of the function.

    Returns:
        whether it does now; see `use_block_attention`.
    """
    if text_config(anatomy.decoder.config)._attn_implementation == _NAME:
        anatomy.decoder.set_attn_implementation("sdpa")  # which is what it does with such masks
    if text_config(anatomy.decoder.config)._attn_implementation != "sdpa":
        return False
    return _change(anatomy, name, lambda _: None, lambda _: None)


def _change(
    anatomy: Anatomy, name: str, plain_mask: Callable[[torch.device], Any], packed_mask: Callable[[Tensor], Any]
) -> bool:
    """Set the attention function; undo it where a trial differs.

    Both masks are given to the trial.
    """
    decoder = anatomy.decoder
    config = text_config(decoder.config)
    windows = [field(config, key) for key in ("sliding_window", "attention_chunk_size")]
    other = [kind for kind in field(config, "layer_types", ()) if kind != "full_attention"]
    if any(windows) or other:
        return False
    ids = (torch.arange(9, device=decoder.device) * 7919 + 1).remainder(anatomy.embedding.num_embeddings).unsqueeze(0)
    positions = torch.cat([torch.arange(4), torch.arange(5)]).to(decoder.device).unsqueeze(0)
    eager = torch.compiler.set_stance("force_eager")
    with evaluating(decoder), products_in_bf16(decoder), eager, warnings.catch_warnings():  # fp8 refuses or rounds nine tokens
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # nine tokens need none
        try:
            plain = [decoder(ids, use_cache=False), decoder(ids, position_ids=positions, use_cache=False)]
            decoder.set_attn_implementation(name)
            ours = [
                decoder(ids, attention_mask=plain_mask(ids.device), use_cache=False),
                decoder(ids, attention_mask=packed_mask(positions), position_ids=positions, use_cache=False),
            ]
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, NotImplementedError):
            decoder.set_attn_implementation("sdpa")
            return False
    for a, b in zip(plain, ours, strict=True):
        expected, found = a.last_hidden_state.float(), b.last_hidden_state.float()
        tolerance = (1e-4 if decoder.dtype == torch.float32 else 0.05) * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=0, atol=tolerance):
            decoder.set_attn_implementation("sdpa")
            return False
    return True


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """See `transformers.AttentionInterface`; queries, keys and values are ``[B, heads, S, D]``."""
    if isinstance(attention_mask, BlockMask) and not query.is_cuda:  # flex attention has no backward pass there
        rows, _, length, _ = query.shape
        attention_mask = create_mask(attention_mask.mask_mod, rows, 1, length, length, device=str(query.device))
    if not isinstance(attention_mask, BlockMask):
        nothing = attention_mask is not None and attention_mask.numel() == 0
        groups = query.shape[1] // key.shape[1]
        if attention_mask is not None and not nothing and query.shape[2] <= _FEW and not _special(kwargs):
            return _attend_by_groups(query, key, value, attention_mask, groups, kwargs.get("scaling")), None
        return sdpa_attention_forward(module, query, key, value, None if nothing else attention_mask, **kwargs)
    if _special(kwargs):
        raise NotImplementedError("attention with a cap, sinks or a bias")
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # what flex attention's kernel has no form of
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    attended = flex(query, key, value, block_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True)
    return attended.transpose(1, 2).contiguous(), None


def _special(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))


def _attend_by_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, groups: int, scale: float | None) -> Tensor:
    """Attend with the queries of heads that share keys side by side.

    A long cache is not copied for each of them.
    """
    rows, heads, tokens, width = query.shape
    together = query.reshape(rows, heads // groups, groups * tokens, width)
    if tokens > 1 and groups > 1:  # the same mask for each head; one row of it does for all
        mask = mask.repeat(1, 1, groups, 1)
    if query.is_cuda and query.dtype == torch.float32:
        found = _by_products(together, key, value, mask, scale)
    else:
        found = scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=scale)
    return found.reshape(rows, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous()


def _by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attend by two plain products.

    torch's kernel for fp32 goes along a row's keys with one block of threads: 49 µs for one query and 1,024 keys on an H200,
    more than half of a step of decoding. A query that may look at nothing, as padding, looks at everything.
    """
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(mask.logical_not(), -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.clamp(min=torch.finfo(scores.dtype).min).softmax(-1) @ value


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compile flex attention for models that are not compiled themselves.

    It is made when first needed, since Inductor's import takes seconds.
    """
    return torch.compile(flex_attention)


AttentionInterface.register(_NAME, attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)

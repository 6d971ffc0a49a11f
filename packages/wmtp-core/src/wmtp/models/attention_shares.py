"""Share of the last layer's attention that marked tokens get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from attrs import define
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from wmtp.models.attention import attend, same_attention

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["AttentionShares", "watch_attention", "watching"]

_NAME = "wmtp-watched"


@define(eq=False)
class AttentionShares:
    """Shares of one forward pass.

    Args:
        layer: number of the layer that is watched.
        marked: ``[B, S]`` bool.
        found: ``[B, S]`` fp32, of each token's attention the share that goes to marked ones, as a mean over the layer's heads.
    """

    layer: int
    marked: Tensor
    found: Tensor | None = None


_current: ContextVar[AttentionShares | None] = ContextVar("attention shares", default=None)


def watch_attention(model: MTPModel) -> bool:
    """Switch a frozen model to attention that can be watched.

    Returns:
        whether it does now; models whose attention is not torch's scaled dot product are left as they are.
    """
    if not same_attention(model.anatomy, _NAME):
        return False
    model.block_attention = False  # its masks are for the function that it had
    return True


@contextmanager
def watching(model: MTPModel, marked: Tensor) -> Iterator[AttentionShares]:
    """Record the attention that the last layer gives to marked tokens.

    It is that of the forward pass inside the context.

    Args:
        model: after `watch_attention`.
        marked: ``[B, S]`` bool.
    """
    shares = AttentionShares(layer=len(model.anatomy.layers) - 1, marked=marked)
    token = _current.set(shares)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would note nothing
            yield shares
    finally:
        _current.reset(token)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """See `transformers.AttentionInterface`."""
    shares = _current.get()
    if shares is not None and getattr(module, "layer_idx", None) == shares.layer:
        # attention over values of 1 at marked tokens and 0 elsewhere: no S × S matrix is kept
        marks = shares.marked.to(value.dtype)[:, None, :, None].expand(value.shape).contiguous()
        given, _ = attend(module, query, key, marks, attention_mask, **kwargs)
        shares.found = given[..., 0].float().mean(dim=-1)
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)

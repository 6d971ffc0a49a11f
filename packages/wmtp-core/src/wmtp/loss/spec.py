"""What the two implementations of the loss are asked, and what they answer.

The classes are not frozen because torch.compile traces no frozen classes of attrs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from wmtp.loss.unembedding import Unembedding

__all__ = ["Answer", "HeadLayout", "Problem", "flatten", "precision"]


@define(slots=False)
class HeadLayout:
    """Where the tensors of one head stand in `Problem.tensors`, and how its logits are transformed.

    Args:
        weight: place of the unembedding ``[V, D]``; heads that share one have the same place.
        bias: place of the bias ``[V]`` or None.
        scale: see `Unembedding`.
        softcap: see `Unembedding`.
    """

    weight: int
    bias: int | None
    scale: float
    softcap: float | None


@define(kw_only=True, eq=False, slots=False)
class Problem:
    """N positions with H predictions each.

    Args:
        tensors: first H hidden states ``[N, D]``, then every unembedding and bias once.
        heads: H layouts.
        ids: ``[N, H]`` int64.
        valid: ``[N, H]`` bool: whose token loss is wanted.
        compute: precision of the products.
        coefficients: ``[N, H]`` fp32; None where only token losses are wanted.
        wanted: for each tensor, whether its gradient is wanted.
        lse: ``[N, H]``, the logarithms of the sums of all exponentials from an earlier pass over the same predictions; then
            only predictions with a coefficient are computed, and no token losses.
        at_most: how many predictions have a coefficient, at most, in all heads together; None: it is not known on the host.
        valid_counts: how many predictions of each head are valid, at most; None: not known on the host.
        entropy: whether the entropy of the predictions is wanted.
        top_k: over how many of the most probable tokens; None: over all.
    """

    tensors: Sequence[Tensor]
    heads: Sequence[HeadLayout]
    ids: Tensor
    valid: Tensor
    compute: torch.dtype
    coefficients: Tensor | None = None
    wanted: Sequence[bool] = ()
    lse: Tensor | None = None
    at_most: int | None = None
    valid_counts: Sequence[int] | None = None
    entropy: bool = False
    top_k: int | None = None

    @property
    def exact(self) -> torch.dtype:
        """What is added up in: fp32, or fp64 for fp64."""
        return torch.promote_types(self.compute, torch.float32)

    def wants(self, place: int | None) -> bool:
        """Whether the gradient of the tensor at a place is wanted."""
        return place is not None and bool(self.wanted) and self.wanted[place]

    def cast(self) -> dict[int, Tensor]:
        """Every unembedding and bias in the precision of the products, by its place."""
        return {
            place: self.tensors[place].detach().to(self.compute)
            for head in self.heads
            for place in (head.weight, head.bias)
            if place is not None
        }


@define(kw_only=True, eq=False, slots=False)
class Answer:
    """What was computed.

    Args:
        losses: token losses ``[N, H]``, 0 where not valid; all 0 where `Problem.lse` was given.
        lse: ``[N, H]``, 0 where not valid.
        entropy: ``[N, H]`` in nats, 0 where not valid; None if not wanted.
        gradients: of Σ coefficients · losses; one a tensor, None where not wanted. Of unembeddings and biases in
            `Problem.exact`, of hidden states in their own precision.
        broken: a bool on the device: more predictions counted than `Problem` said; None where that cannot be.
    """

    losses: Tensor
    lse: Tensor
    entropy: Tensor | None
    gradients: list[Tensor | None]
    broken: Tensor | None = None


def flatten(hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding]) -> tuple[list[HeadLayout], list[Tensor]]:
    """List all tensors once, for autograd; say for each head where its weight and bias stand in the list."""
    tensors = [h.reshape(-1, h.shape[-1]) for h in hidden]
    first = len(tensors)

    def place(tensor: Tensor) -> int:
        for i in range(first, len(tensors)):
            if tensors[i] is tensor or _same_storage(tensors[i], tensor):
                return i
        tensors.append(tensor)
        return len(tensors) - 1

    heads = []
    for u in unembeddings:
        bias = None if u.bias is None else place(u.bias)
        heads.append(HeadLayout(place(u.weight), bias, u.scale, u.softcap))
    return heads, tensors


def _same_storage(one: Tensor, other: Tensor) -> bool:
    """Detached aliases of one weight are different objects; those with a gradient are told apart by autograd."""
    if one.requires_grad or other.requires_grad or torch.compiler.is_compiling():
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def precision(hidden: Tensor) -> torch.dtype:
    """What products are computed in."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

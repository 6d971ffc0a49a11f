"""The weighted cross entropy of H heads, never holding more than a chunk of logits.

    L = Σ_i Σ_k c[i, k] · CE(logits_k(h_k[i]), x[i, k])

with coefficients c that already hold head weight, token weight and normaliser. The gradient of the hidden states and of the
unembedding is computed together with the loss, chunk by chunk, so the logits of a chunk are made once and kept nowhere.
A prediction whose coefficient is 0 costs its logits at most, and no product of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor

from wmtp.loss.dispatch import scaled, solve
from wmtp.loss.spec import HeadLayout, Problem, flatten, precision
from wmtp.loss.unembedding import Unembedding

__all__ = ["TokenPass", "token_losses", "token_pass", "token_statistics", "weighted_cross_entropy"]


@define(kw_only=True, eq=False, slots=False)  # torch.compile traces no frozen classes of attrs
class TokenPass:
    """What a pass over the predictions without gradient gives, for statistics, weights, and a second pass.

    Args:
        losses: ``[…, H]`` fp32 (fp64 for fp64 hidden states), the token losses, 0 where not valid.
        lse: ``[…, H]``, the logarithms of the sums of all exponentials, which `weighted_cross_entropy` need not find again.
        entropy: ``[…, H]`` in nats, 0 where not valid; None if not asked for.
    """

    losses: Tensor
    lse: Tensor
    entropy: Tensor | None = None


def weighted_cross_entropy(
    hidden: Sequence[Tensor],
    unembeddings: Sequence[Unembedding],
    ids: Tensor,
    coefficients: Tensor,
    valid: Tensor,
    *,
    known: TokenPass | None = None,
    at_most: int | None = None,
    valid_counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted loss of all heads, and the token losses.

    Args:
        hidden: one ``[…, D]`` a head, each what that head's unembedding multiplies.
        unembeddings: one a head; heads may share one, whose gradient is then accumulated once, in fp32.
        ids: ``[…, H]`` int64, the targets.
        coefficients: ``[…, H]``, without gradient; 0 where a prediction does not count.
        valid: ``[…, H]`` bool, the predictions whose token loss is wanted. Must include every non-zero coefficient; where
            the token losses are known already, ``coefficients != 0`` saves the logits of the others too.
        known: the pass over the same hidden states that the coefficients were made from. Its token losses are what is
            returned, and only predictions with a coefficient are computed.
        at_most: how many coefficients are not 0, or a bound of that, where the host knows it. On a GPU the products of no
            more predictions are started, and nothing is read back. If there are more, the loss is NaN.
        valid_counts: H numbers, how many predictions of each head are valid, or bounds of that; as ``at_most``.

    Returns:
        the loss, a scalar with gradient; and the token losses ``[…, H]`` fp32, detached, 0 where not valid.

    Raises:
        TypeError: a tensor is sharded (a DTensor), or the tensors do not fit each other.
    """
    _check(hidden, unembeddings, ids)
    heads, tensors = flatten(hidden, unembeddings)
    horizon = ids.shape[-1]
    loss, losses = _WeightedCrossEntropy.apply(
        ids.reshape(-1, horizon),
        coefficients.detach().reshape(-1, horizon),
        valid.reshape(-1, horizon),
        None if known is None else known.losses.reshape(-1, horizon),
        None if known is None else known.lse.reshape(-1, horizon),
        tuple((h.weight, h.bias, h.scale, h.softcap) for h in heads),
        precision(tensors[0]),
        torch.is_grad_enabled(),
        at_most,
        None if valid_counts is None else tuple(valid_counts),
        *tensors,
    )
    return loss, losses.view(ids.shape)


def token_losses(hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding], ids: Tensor, valid: Tensor) -> Tensor:
    """The cross entropy of every valid prediction, without gradient.

    Args:
        hidden: one ``[…, D]`` a head.
        unembeddings: one a head.
        ids: ``[…, H]`` int64, the targets.
        valid: ``[…, H]`` bool.

    Returns:
        ``[…, H]`` fp32 (fp64 for fp64 hidden states), 0 where not valid.
    """
    return token_pass(hidden, unembeddings, ids, valid).losses


def token_statistics(
    hidden: Sequence[Tensor],
    unembeddings: Sequence[Unembedding],
    ids: Tensor,
    valid: Tensor,
    *,
    entropy: bool = False,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The cross entropy of every valid prediction, and the entropy of what was predicted; see `token_pass`.

    Returns:
        the token losses, and the entropy or None.
    """
    found = token_pass(hidden, unembeddings, ids, valid, entropy=entropy, top_k=top_k)
    return found.losses, found.entropy


@torch.no_grad()
def token_pass(
    hidden: Sequence[Tensor],
    unembeddings: Sequence[Unembedding],
    ids: Tensor,
    valid: Tensor,
    *,
    entropy: bool = False,
    top_k: int | None = None,
    valid_counts: Sequence[int] | None = None,
) -> TokenPass:
    """The cross entropy of every valid prediction, and the entropy of what was predicted; without gradient.

    Args:
        hidden: one ``[…, D]`` a head.
        unembeddings: one a head.
        ids: ``[…, H]`` int64, the targets.
        valid: ``[…, H]`` bool.
        entropy: whether the entropy is wanted.
        top_k: take it over the ``top_k`` most probable tokens, whose probabilities are made to add up to 1; None: over all.
        valid_counts: see `weighted_cross_entropy`. If there are more, all token losses are NaN.
    """
    _check(hidden, unembeddings, ids)
    heads, tensors = flatten([h.detach() for h in hidden], unembeddings)
    horizon = ids.shape[-1]
    answer = solve(
        Problem(
            tensors=[tensor.detach() for tensor in tensors],
            heads=heads,
            ids=ids.reshape(-1, horizon),
            valid=valid.reshape(-1, horizon),
            compute=precision(tensors[0]),
            valid_counts=valid_counts,
            entropy=entropy,
            top_k=top_k,
        )
    )
    losses = answer.losses if answer.broken is None else torch.where(answer.broken, torch.nan, answer.losses)
    return TokenPass(
        losses=losses.reshape(ids.shape),
        lse=answer.lse.reshape(ids.shape),
        entropy=None if answer.entropy is None else answer.entropy.reshape(ids.shape),
    )


class _WeightedCrossEntropy(torch.autograd.Function):
    """Computes the gradients for an upstream gradient of 1 in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        ids: Tensor,
        coefficients: Tensor,
        valid: Tensor,
        known_losses: Tensor | None,
        lse: Tensor | None,
        layouts: tuple[tuple[int, int | None, float, float | None], ...],
        compute: torch.dtype,
        with_gradient: bool,
        at_most: int | None,
        valid_counts: tuple[int, ...] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        unit = None
        if compute == torch.float16:
            # coefficients of 1 / Z, times probabilities, would leave the range of fp16
            unit = coefficients.abs().max().float() / 256
            coefficients = torch.where(unit > 0, coefficients / unit, 0.0)
        answer = solve(
            Problem(
                tensors=[tensor.detach() for tensor in tensors],
                heads=[HeadLayout(*layout) for layout in layouts],
                ids=ids,
                valid=valid,
                compute=compute,
                coefficients=coefficients,
                wanted=[with_gradient and needed for needed in ctx.needs_input_grad[-len(tensors) :]],
                lse=lse,
                at_most=at_most,
                valid_counts=valid_counts,
            )
        )
        losses = answer.losses.contiguous() if known_losses is None else known_losses.clone()
        # NaN · 0 is NaN: an infinite token loss must show in the loss only where it counts
        loss = torch.where(coefficients != 0, losses * coefficients.to(losses.dtype), 0.0).sum()
        if unit is not None:
            loss = loss * unit
        if answer.broken is not None:
            loss = torch.where(answer.broken, torch.nan, loss)
        ctx.wanted = [gradient is not None for gradient in answer.gradients]
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(unit, *(gradient for gradient in answer.gradients if gradient is not None))
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("weighted_cross_entropy has no second derivative (create_graph=True)")
        unit, *saved = ctx.saved_tensors
        factor = upstream if unit is None else upstream * unit
        may_change = not torch.compiler.is_compiling() and not _graph_is_kept()
        found = iter(saved)
        gradients = [
            scaled(next(found), factor, dtype, may_change) if wanted else None
            for wanted, dtype in zip(ctx.wanted, ctx.dtypes, strict=True)
        ]
        return (None,) * 10 + tuple(gradients)


def _graph_is_kept() -> bool:
    """Whether this backward pass may come again (``retain_graph``): then the gradients must stay as they are."""
    asked = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def _check(hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding], ids: Tensor) -> None:
    horizon = ids.shape[-1]
    if not len(hidden) == len(unembeddings) == horizon:
        raise TypeError(
            f"targets of shape {list(ids.shape)} are for H = {horizon} heads; there are {len(hidden)} hidden states and "
            f"{len(unembeddings)} unembeddings"
        )
    for k, (states, unembedding) in enumerate(zip(hidden, unembeddings, strict=True)):
        if any(hasattr(tensor, "full_tensor") for tensor in (states, unembedding.weight, unembedding.bias)):
            raise TypeError(
                f"head {k + 1}: the loss takes plain tensors, and this is a DTensor; compute the loss where FSDP has gathered "
                f"the unembedding (in the forward method of the module that holds it), or pass weight.full_tensor()"
            )
        weight = unembedding.weight
        if weight.dim() != 2 or states.shape != (*ids.shape[:-1], weight.shape[1]):
            raise TypeError(
                f"head {k + 1}: hidden states {list(states.shape)}, unembedding [V, D] {list(weight.shape)} and targets "
                f"[..., H] {list(ids.shape)} do not fit each other"
            )

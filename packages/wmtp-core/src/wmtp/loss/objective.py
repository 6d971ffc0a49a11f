"""Objectives of heads 2..H: agreement with head 1, not the data.

A draft of head k is accepted where head 1 agrees with it. So with p head 1's distribution of the target token, without
gradient, and q head k's, a head may learn

    kl   KL(p ‖ q) = Σ p (log p − log q)
    tv   TV(p, q) = ½ Σ |p − q| = 1 − Σ min(p, q)   the expected share of sampled drafts that are refused (arXiv 2211.17192)
    lk   λ KL + (1 − λ) TV   with λ = exp(−η · Σ min(p, q)), without gradient (arXiv 2602.23881)

Head k at position t predicts token t+k, and so does head 1 at position t+k−1, which lies in the same document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from attrs import define
from torch import Tensor

from wmtp.loss.cross_entropy import (
    Problem,
    TokenPass,
    check_shapes,
    differentiable,
    flatten,
    precision,
    solve,
)
from wmtp.loss.unembedding import Unembedding

__all__ = ["HeadAgreement", "HeadLoss", "HeadObjective", "head_agreement", "weighted_head_loss"]


@define(slots=False)
class HeadObjective:
    """Objective of heads 2..H.

    Args:
        name: ``kl``, ``tv`` or ``lk``.
        eta: η of ``lk``: the larger, the sooner it goes over from KL to TV as a head learns.
    """

    name: Literal["kl", "tv", "lk"]
    eta: float = 3.0


@define(kw_only=True, eq=False, slots=False)
class HeadAgreement:
    """Agreement of heads 2..H with head 1 on the same token.

    Head 1 agrees with itself.

    Args:
        token_losses: ``[…, H]``, cross entropy with the data, 0 where not measured.
        overlap: ``[…, H]``, Σ min(p, q), the expected acceptance of a sampled draft; 0 where not measured.
        same_top: ``[…, H]`` bool, both take the same token for the most probable one: a greedy draft is accepted.
    """

    token_losses: Tensor
    overlap: Tensor
    same_top: Tensor


@define(kw_only=True, eq=False, slots=False)
class HeadLoss:
    """Weighted loss of all heads, heads 2..H by an objective.

    Args:
        loss: scalar, with gradient.
        values: ``[…, H]``, of head 1 the token loss, of heads 2..H the objective; 0 where there is no coefficient.
        agreement: of the predictions that were computed.
    """

    loss: Tensor
    values: Tensor
    agreement: HeadAgreement


def weighted_head_loss(
    hidden: Sequence[Tensor],
    unembeddings: Sequence[Unembedding],
    ids: Tensor,
    coefficients: Tensor,
    valid: Tensor,
    objective: HeadObjective,
    *,
    precomputed: TokenPass | None = None,
    at_most: int | None = None,
    valid_counts: Sequence[int] | None = None,
) -> HeadLoss:
    """Compute weighted cross entropy of head 1, and agreement of heads 2..H.

    L = Σ_t c[t, 1] CE[t, 1] + Σ_t Σ_{k≥2} c[t, k] D(p[t+k−1] ‖ q_k[t]). Only chunks of logits are held.

    Arguments and errors are those of `weighted_cross_entropy`, but for the shapes: ``[B, S, …]``, S positions of a row of text.
    A coefficient of head k at t needs position t+k−1 in the same row.

    Args:
        hidden: one ``[B, S, D]`` a head. Head 1's gets the gradient of its own token losses only.
        unembeddings: one a head.
        ids: ``[B, S, H]``.
        coefficients: ``[B, S, H]``.
        valid: ``[B, S, H]``.
        objective: of heads 2..H.
        precomputed: see `weighted_cross_entropy`.
        at_most: see `weighted_cross_entropy`.
        valid_counts: see `weighted_cross_entropy`; head 1's number bounds the positions that heads 2..H answer to.
    """
    check_shapes(hidden, unembeddings, ids)
    heads, tensors = flatten(hidden, unembeddings)
    loss, losses, values, overlap, same_top = differentiable(
        heads, tensors, ids, coefficients, valid, precomputed, at_most, valid_counts, objective
    )
    agreement = HeadAgreement(token_losses=losses, overlap=overlap, same_top=same_top)
    return HeadLoss(loss=loss, values=values, agreement=agreement)


@torch.no_grad()
def head_agreement(
    hidden: Sequence[Tensor],
    unembeddings: Sequence[Unembedding],
    ids: Tensor,
    valid: Tensor,
) -> HeadAgreement:
    """Measure agreement of heads 2..H with head 1, without gradient.

    Arguments: see `weighted_head_loss`.
    """
    check_shapes(hidden, unembeddings, ids)
    heads, tensors = flatten([h.detach() for h in hidden], unembeddings)
    horizon = ids.shape[-1]
    answer = solve(
        Problem(
            tensors=[tensor.detach() for tensor in tensors],
            heads=heads,
            ids=ids.reshape(-1, horizon),
            valid=valid.reshape(-1, horizon),
            compute=precision(tensors[0]),
            objective=HeadObjective("tv"),
        )
    )
    if answer.overlap is None or answer.same_top is None:
        raise AssertionError("an objective was given")
    losses = answer.losses if answer.broken is None else torch.where(answer.broken, torch.nan, answer.losses)
    shape = ids.shape
    return HeadAgreement(
        token_losses=losses.reshape(shape), overlap=answer.overlap.reshape(shape), same_top=answer.same_top.reshape(shape)
    )

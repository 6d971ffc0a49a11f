"""Returns, advantages and token weights from a critic's values.

Pure functions of whole tensors. Everywhere ``value[t]`` is V of the text up to and with token t, and a document is a stretch of
equal numbers in ``document``. Nothing passes from one document into the next, nor into padding, whose results are 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wmtp.data.batch import PADDING
from wmtp.loss.weights import statistics_dtype

__all__ = [
    "advantage_weights",
    "advantages",
    "by_token",
    "correlation",
    "discounted_sums",
    "document_means",
    "lambda_returns",
    "masked_moments",
    "monte_carlo_returns",
]


def discounted_sums(values: Tensor, decay: float, document: Tensor) -> Tensor:
    """Sum each token's and all later values of its document, discounted.

    y[t] = x[t] + decay · y[t+1] inside each document, by doubling: log₂ S steps, each over the whole tensor. After step i, y[t]
    covers 2^i tokens from t on: y[t] += decay^(2^i) · y[t + 2^i]. Where decay ≤ 1 no factor grows.

    Args:
        values: ``[B, S]``, x.
        decay: between 0 and 1.
        document: ``[B, S]``, the document of each token, or `PADDING`.

    Returns:
        ``[B, S]``.
    """
    sums = torch.where(document != PADDING, values, 0.0)
    length, reach = values.shape[1], 1
    while reach < length:
        # documents are in one piece: what has the same number at both ends has it in between
        same = document[:, reach:] == document[:, :-reach]
        added = torch.where(same, sums[:, reach:], 0.0) * decay**reach
        sums = torch.cat([sums[:, :-reach] + added, sums[:, -reach:]], dim=1)
        reach *= 2
    return sums


def lambda_returns(value: Tensor, reward: Tensor, document: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Compute λ-returns within each document (Sutton & Barto, 2nd ed., eq. 12.18).

    G[t] = (1 − λ) γ V[t+1] + λ γ G[t+1], and G = R at the last token of a document.

    Args:
        value: ``[B, S]``, V.
        reward: ``[B, S]``, at each token the reward R of its document.
        document: ``[B, S]``.
        gamma: γ.
        lam: λ; 1 gives the discounted reward, 0 the value of the next state.

    Returns:
        ``[B, S]``, what V should be.
    """
    following = (1 - lam) * gamma * _next(value)
    return discounted_sums(torch.where(_is_last(document), reward, following), lam * gamma, document)


def monte_carlo_returns(reward: Tensor, document: Tensor, *, gamma: float) -> Tensor:
    """Compute Monte Carlo returns within each document.

    γ^(T−t) R: `lambda_returns` with λ = 1, which needs no values.
    """
    return discounted_sums(torch.where(_is_last(document), reward, 0.0), gamma, document)


def advantages(
    value: Tensor, reward: Tensor, document: Tensor, *, gamma: float, lam: float, delta: Literal["gae", "td"] = "gae"
) -> Tensor:
    """Compute generalized advantages by token (GAE: arXiv 1506.02438, eq. 16).

        δ[t] = r[t] + γ V[t] − V[t−1]       r = R at the last token and 0 before; after the last token V := 0
        A[t] = δ[t] + γ λ A[t+1]            λ → 1 with γ = 1: A[t] = R − V[t−1]

    The first token of a document has no state before it: there V[t−1] := 0, and the result is of no use, nor is it used, as
    nothing predicts that token.

    Args:
        value: ``[B, S]``, V.
        reward: ``[B, S]``, at each token the reward R of its document.
        document: ``[B, S]``.
        gamma: γ.
        lam: λ.
        delta: ``gae``: A; ``td``: δ alone.

    Returns:
        ``[B, S]``.
    """
    last = _is_last(document)
    follows = _next(document, PADDING - 1) == document
    before = torch.zeros_like(value)
    before[:, 1:] = torch.where(follows[:, :-1], value[:, :-1], 0.0)
    gained = torch.where(last, reward, gamma * value) - before
    return discounted_sums(gained, 0.0 if delta == "td" else gamma * lam, document)


def advantage_weights(
    advantage: Tensor, *, mean: Tensor, std: Tensor, beta: float, min_weight: float, max_weight: float
) -> Tensor:
    """Compute weights of advantage-weighted regression (arXiv 1910.00177).

    clip(exp(z / β), w_min, w_max) with z = (A − mean) / std.

    Args:
        advantage: any shape.
        mean: of the advantages, scalar.
        std: of the advantages, scalar; where it is 0, so is z; where it is NaN, as for values that are no numbers, all is.
        beta: β, the temperature.
        min_weight: w_min.
        max_weight: w_max.
    """
    centred = advantage - mean
    z = torch.where(std == 0, torch.zeros_like(centred), centred / std)
    return (z / beta).exp().clamp(min_weight, max_weight).to(advantage.dtype)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number, mean and variance of the marked values.

    Mean and variance of none are 0. Sums are in fp64.
    """
    exact = torch.where(mask, values.to(statistics_dtype(values.device)), 0.0)
    count = mask.sum().to(exact.dtype)
    mean = exact.sum() / count.clamp(min=1)
    variance = torch.where(mask, exact - mean, 0.0).square().sum() / count.clamp(min=1)
    return count, mean, variance


def document_means(values: Tensor, mask: Tensor, document: Tensor, count: int) -> Tensor:
    """Average each document's marked tokens.

    Args:
        values: ``[B, S]``.
        mask: ``[B, S]`` bool.
        document: ``[B, S]``.
        count: how many documents there are.

    Returns:
        ``[count]``; 0 for a document without any marked token.
    """
    place = torch.where(mask, document, count).flatten()
    sums = values.new_zeros(count + 1).index_add(0, place, torch.where(mask, values, 0.0).flatten())
    sizes = values.new_zeros(count + 1).index_add(0, place, mask.to(values.dtype).flatten())
    return sums[:count] / sizes[:count].clamp(min=1)


def correlation(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """Pearson correlation over the marked places; NaN where one side is constant."""
    _, left_mean, left_variance = masked_moments(left, mask)
    _, right_mean, right_variance = masked_moments(right, mask)
    _, product, _ = masked_moments((left - left_mean) * (right - right_mean), mask)
    return product / (left_variance * right_variance).sqrt()


def by_token(of_documents: Tensor, document: Tensor) -> Tensor:
    """Place each document's number at all its tokens; 0 at padding.

    Args:
        of_documents: ``[N]``.
        document: ``[B, S]``.
    """
    return torch.where(document != PADDING, of_documents[document.clamp(min=0)], 0.0)


def _next(values: Tensor, end: float = 0.0) -> Tensor:
    """Shift left by one place; ``end`` fills the row's end."""
    return torch.nn.functional.pad(values[:, 1:], (0, 1), value=end)


def _is_last(document: Tensor) -> Tensor:
    """Mark the last token of each document."""
    return (document != PADDING) & (_next(document, PADDING - 1) != document)

"""Pairs of correct and incorrect answers to one problem, of similar length."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["pair_documents", "pairs_of_step", "pairwise_accuracy", "pairwise_loss"]


def pair_documents(
    groups: NDArray[np.int64], correct: NDArray[np.bool_], lengths: NDArray[np.int64], max_ratio: float
) -> NDArray[np.int64]:
    """Match the documents of a data set into disjoint pairs.

    As many as possible are matched. Within a group both classes are sorted by length, and each document of the smaller class
    takes the nearest of the other, in this order. Pairs of too different a length are given up.

    Args:
        groups: the group of each document.
        correct: whether each document is correct.
        lengths: of each document, > 0.
        max_ratio: longer / shorter of a pair is at most this.

    Returns:
        for each document the number of its pair (that of the correct document), or −1.
    """
    pair = np.full(len(groups), -1, np.int64)
    order = np.lexsort((lengths, groups))
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        few, many = members[correct[members]], members[~correct[members]]
        if len(few) > len(many):
            few, many = many, few
        place = 0
        for number, document in enumerate(few):
            last = len(many) - (len(few) - number)  # as many must be left for those that come
            distance = np.abs(lengths[many[place : last + 1]] - lengths[document])
            place += int(distance.argmin())
            other = many[place]
            place += 1
            short, long = sorted((lengths[document], lengths[other]))
            if long <= max_ratio * short:
                pair[[document, other]] = document if correct[document] else other
    return pair


def pairs_of_step(group: Tensor, correct: Tensor, length: Tensor, max_ratio: float) -> Tensor:
    """Pair documents of a group: correct with incorrect, nearest in length.

    Args:
        group: ``[N]`` int64.
        correct: ``[N]`` bool.
        length: ``[N]``, tokens to learn; documents without any are in no pair.
        max_ratio: as for `pair_documents`.

    Returns:
        ``[N, N]`` bool: [i, j] is a pair of the correct document i and the incorrect document j.
    """
    length = length.float()
    some = length > 0
    allowed = correct[:, None] & ~correct[None, :] & (group[:, None] == group[None, :]) & some[:, None] & some[None, :]
    longer = torch.maximum(length[:, None], length[None, :])
    shorter = torch.minimum(length[:, None], length[None, :])
    allowed = allowed & (longer <= max_ratio * shorter)
    distance = torch.where(allowed, longer - shorter, torch.inf)
    nearest = torch.zeros_like(allowed)
    nearest.scatter_(1, distance.argmin(1, keepdim=True), True)
    nearest.scatter_(0, distance.argmin(0, keepdim=True), True)
    return nearest & allowed


def pairwise_loss(value: Tensor, pairs: Tensor) -> Tensor:
    """Bradley–Terry loss over the pairs: mean −log σ(V_correct − V_incorrect).

    0 without any pair (Bradley & Terry 1952).

    Args:
        value: ``[N]``, one a document.
        pairs: ``[N, N]``.
    """
    difference = value[:, None] - value[None, :]
    losses = torch.where(pairs, -torch.nn.functional.logsigmoid(difference), 0.0)
    return losses.sum() / pairs.sum().clamp(min=1)


def pairwise_accuracy(value: Tensor, pairs: Tensor) -> Tensor:
    """Return the share of pairs whose correct document has the higher value.

    NaN without pairs.
    """
    return (pairs & (value[:, None] > value[None, :])).sum() / pairs.sum()

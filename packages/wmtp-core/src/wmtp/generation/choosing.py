"""Greedy choices of a step, as functions that can be compiled.

Compiled, they have fewer and faster kernels than torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from wmtp.loss import Unembedding
from wmtp.models.few_rows import step_code

__all__ = ["TIE", "accept", "choose_best", "judge", "next_tokens", "write_tokens"]

#: logits closer than this share of the largest one count as tied; rounding was seen to move them by a hundredth of it (fp32)
TIE: Final = 2e-4

#: logits that one block of threads compares; a row's are too many for one
_BLOCK: Final = 512


def choose_best(unembedding: Unembedding, hidden: Tensor, *, compiled: bool) -> Tensor:
    """Choose the most probable token ``[...]`` of hidden states ``[..., D]``."""
    if compiled:
        return step_code(_best, compiled=True)(unembedding, hidden)
    return unembedding.logits(hidden).argmax(-1)


def judge(
    unembedding: Unembedding, hidden: Tensor, drafts: Tensor, *, exact: bool, compiled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare drafts with head 1's own choices.

    Args:
        unembedding: of head 1.
        hidden: ``[B, 1 + K, D]``.
        drafts: ``[B, K]``.
        exact: whether ties are looked for.
        compiled: whether compiled code does it.

    Returns:
        the choices ``[B, 1 + K]``; how many drafts are right, and the token after them, ``[B]`` each; and drafts, that token,
        the count and the ties in one tensor.
    """
    best_two = _best_two if compiled else _torch_best_two
    return step_code(_judged, compiled=compiled)(unembedding, hidden, drafts, exact, best_two)


def next_tokens(tokens: Tensor, known: Tensor, drafts: Tensor, *, compiled: bool) -> tuple[Tensor, Tensor]:
    """Return what a step reads: each row's last known token and drafts.

    Args:
        tokens: ``[B, L]``.
        known: ``[B]``, how many of them are known.
        drafts: ``[B, K]``.
        compiled: whether compiled code does it.

    Returns:
        their places and ids, ``[B, 1 + K]`` each.
    """
    return step_code(_next, compiled=compiled)(tokens, known, drafts)


def accept(best: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Count each row's accepted drafts, and choose the next token.

    A draft is accepted that equals head 1's choice.

    Returns:
        both ``[B]``.
    """
    if not drafts.shape[1]:
        return torch.zeros_like(best[:, 0]), best[:, 0]
    accepted = (best[:, :-1] == drafts).cumprod(dim=1).sum(dim=1)
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def write_tokens(
    tokens: Tensor, known: Tensor, going: Tensor, drafts: Tensor, accepted: Tensor, following: Tensor, *, compiled: bool
) -> None:
    """Write accepted drafts and the token after them into the rows.

    Args:
        tokens: ``[B, L]``, in place.
        known: ``[B]``, how many of them are known, in place.
        going: ``[B]``, 0 for rows that are finished.
        drafts: ``[B, K]``.
        accepted, following: ``[B]``.
        compiled: whether compiled code does it.
    """
    step_code(_written, compiled=compiled)(tokens, known, going, drafts, accepted, following)


def _next(tokens: Tensor, known: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    slots = (known - 1)[:, None]
    ids = tokens.gather(1, slots)
    if drafts.shape[1]:
        slots = slots + torch.arange(1 + drafts.shape[1], device=known.device)
        ids = torch.cat([ids, drafts], dim=1)
    return slots, ids


def _written(tokens: Tensor, known: Tensor, going: Tensor, drafts: Tensor, accepted: Tensor, following: Tensor) -> None:
    if not drafts.shape[1]:
        tokens.scatter_(1, known[:, None], following[:, None])
        known += going
        return
    new = torch.cat([drafts, following[:, None]], dim=1)
    places = torch.arange(new.shape[1], device=new.device)
    new = torch.where(places == accepted[:, None], following[:, None], new)
    # the places after the accepted ones hold rejected drafts until the next step writes them
    tokens.scatter_(1, known[:, None] + places, new)
    known += (accepted + 1) * going


def _judged(
    unembedding: Unembedding, hidden: Tensor, drafts: Tensor, exact: bool, best_two: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = unembedding.logits(hidden)
    if exact:
        best, first, second = best_two(logits)
        ties = [(first - second <= TIE * logits.abs().amax(-1)).long()]
    else:
        best, ties = logits.argmax(-1), []
    accepted, following = accept(best, drafts)
    return best, accepted, following, torch.cat([drafts, following[:, None], accepted[:, None], *ties], dim=1)


def _torch_best_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top = logits.topk(2, dim=-1).values
    return logits.argmax(-1), top[..., 0], top[..., 1]


def _best(unembedding: Unembedding, hidden: Tensor) -> Tensor:
    blocks = _in_blocks(unembedding.logits(hidden))
    value, index = blocks.max(-1)
    which = value.argmax(-1, keepdim=True)
    return (which * _BLOCK + index.gather(-1, which)).squeeze(-1)


def _best_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index of the largest logit, and the two largest.

    Of equal ones the first. The row is divided into blocks, which Inductor would not do.
    """
    blocks = _in_blocks(logits)
    value, index = blocks.max(-1)
    places = torch.arange(_BLOCK, device=logits.device)
    runner_up = blocks.masked_fill(places == index[..., None], -torch.inf).amax(-1)
    first, which = value.max(-1, keepdim=True)
    others = value.masked_fill(torch.arange(value.shape[-1], device=logits.device) == which, -torch.inf).amax(-1)
    second = torch.maximum(others, runner_up.gather(-1, which).squeeze(-1))
    return (which * _BLOCK + index.gather(-1, which)).squeeze(-1), first.squeeze(-1), second


def _in_blocks(logits: Tensor) -> Tensor:
    padded = F.pad(logits, (0, -logits.shape[-1] % _BLOCK), value=-torch.inf)
    return padded.unflatten(-1, (-1, _BLOCK))

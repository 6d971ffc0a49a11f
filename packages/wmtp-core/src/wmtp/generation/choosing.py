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
from wmtp.models.layer_steps import chooses_by_kernel

__all__ = ["TIE", "accept", "choose_best", "judge", "next_tokens", "taken", "write_tokens"]

#: logits closer than this share of the largest one count as tied; rounding was seen to move them by a hundredth of it (fp32)
TIE: Final = 2e-4

#: logits that one block of threads compares; a row's are too many for one
_BLOCK: Final = 512


def choose_best(unembedding: Unembedding, ids: Tensor | None, hidden: Tensor, at: Tensor | None, *, compiled: bool) -> Tensor:
    """Choose the most probable tokens.

    Args:
        unembedding: of a head.
        ids: the tokens that it has; None: all.
        hidden: ``[B, n, D]``.
        at: ``[B, 1]``, of each row the place that is looked at. None: all.
        compiled: whether compiled code or kernels do it.

    Returns:
        ``[B, n]``, or ``[B, 1]``.
    """
    if compiled and chooses_by_kernel(unembedding, hidden):
        from wmtp.models.head_kernels import best

        return best(hidden, unembedding.weight, ids, at)
    return step_code(_best, compiled=compiled)(unembedding, ids, hidden, at, _in_blocks if compiled else None)


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
    if compiled and exact and chooses_by_kernel(unembedding, hidden):
        from wmtp.models.head_kernels import best_two

        return step_code(_compared, compiled=True)(drafts, best_two(hidden, unembedding.weight))
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


def taken(hidden: Tensor, at: Tensor) -> Tensor:
    """Take each row's place ``at`` ``[B, 1]`` of ``[B, T, D]``."""
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], at]


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
) -> Tensor:
    """Write accepted drafts and the token after them into the rows.

    Returns the place ``[B]`` of the token before that last one.

    Args:
        tokens: ``[B, L]``, in place.
        known: ``[B]``, how many of them are known, in place.
        going: ``[B]``, 0 for rows that are finished.
        drafts: ``[B, K]``.
        accepted, following: ``[B]``.
        compiled: whether compiled code does it.
    """
    return step_code(_written, compiled=compiled)(tokens, known, going, drafts, accepted, following)


def _next(tokens: Tensor, known: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    slots = (known - 1)[:, None]
    ids = tokens.gather(1, slots)
    if drafts.shape[1]:
        slots = slots + torch.arange(1 + drafts.shape[1], device=known.device)
        ids = torch.cat([ids, drafts], dim=1)
    return slots, ids


def _written(tokens: Tensor, known: Tensor, going: Tensor, drafts: Tensor, accepted: Tensor, following: Tensor) -> Tensor:
    if not drafts.shape[1]:
        tokens.scatter_(1, known[:, None], following[:, None])
        known += going
        return known - 2
    new = torch.cat([drafts, following[:, None]], dim=1)
    places = torch.arange(new.shape[1], device=new.device)
    new = torch.where(places == accepted[:, None], following[:, None], new)
    # the places after the accepted ones hold rejected drafts until the next step writes them
    tokens.scatter_(1, known[:, None] + places, new)
    known += (accepted + 1) * going
    return known - 2


def _judged(
    unembedding: Unembedding, hidden: Tensor, drafts: Tensor, exact: bool, best_two: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = unembedding.logits(hidden)
    if exact:
        return _compared(drafts, (*best_two(logits), logits.abs().amax(-1)))
    return _compared(drafts, (logits.argmax(-1),))


def _compared(drafts: Tensor, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare drafts with the choices.

    ``found`` are these and, where ties are looked for, the two best logits and the largest absolute value.
    """
    best, *numbers = found
    ties: list[Tensor] = []
    if numbers:
        first, second, size = numbers
        ties = [(first - second <= TIE * size).long()]
    accepted, following = accept(best, drafts)
    return best, accepted, following, torch.cat([drafts, following[:, None], accepted[:, None], *ties], dim=1)


def _torch_best_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top = logits.topk(2, dim=-1).values
    return logits.argmax(-1), top[..., 0], top[..., 1]


def _best(
    unembedding: Unembedding, ids: Tensor | None, hidden: Tensor, at: Tensor | None, divided: Callable[[Tensor], Tensor] | None
) -> Tensor:
    logits = unembedding.logits(hidden if at is None else taken(hidden, at))
    if divided is None:
        best = logits.argmax(-1)
    else:
        value, index = divided(logits).max(-1)
        which = value.argmax(-1, keepdim=True)
        best = (which * _BLOCK + index.gather(-1, which)).squeeze(-1)
    return best if ids is None else ids[best]


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

"""Triton kernels of a greedy step of one text, but its layers'.

They come before the layers, after them, and before those of a chain. Angles and masks of all positions are tables, made once by
the model's own code: a step copies rows of them. What a step chose is judged on the device, and written where the CPU reads it
while the heads still draft.
"""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001, ANN202, RUF005 - nor does it know a starred tuple
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from wmtp.models.head_kernels import normed
from wmtp.models.layer_kernels import Norm
from wmtp.models.native.layouts import ChainRule
from wmtp.models.product_kernels import early, let_begin, product, scale_of, shape_of, tiles_of, wait

__all__ = ["Rows", "Tables", "begin", "join_tokens", "settle"]

#: numbers that a program copies at a time
_BLOCK: Final = 1024


@frozen(eq=False)
class Tables:
    """Angles and masks of all positions.

    Args:
        cos, sin: ``[C, d]``.
        mask: ``[C, W]``, added to scores.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor


@frozen(eq=False)
class Rows:
    """Positions of T tokens, with their angles and masks.

    Args:
        slots: ``[1, T]``.
        cos, sin: ``[1, T, d]``.
        mask: ``[1, 1, T, W]``.
    """

    slots: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor

    @classmethod
    def like(cls, tables: Tables, tokens: int) -> Rows:
        """Make room for some tokens, at position 0."""
        d, width = tables.cos.shape[1], tables.mask.shape[1]
        made = tables.cos.new_zeros
        slots = torch.zeros(1, tokens, dtype=torch.int64, device=tables.cos.device)
        return cls(slots, made(1, tokens, d), made(1, tokens, d), tables.mask.new_zeros(1, 1, tokens, width))


@triton.jit
def _copy(source, at, target, to, N, BLOCK: tl.constexpr) -> None:
    """Copy a row of N numbers."""
    for start in range(0, N, BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = place < N
        tl.store(target + to * N + place, tl.load(source + at * N + place, mask=there, other=0.0), mask=there)


@triton.jit
def _place(slot, row, cos_table, sin_table, mask_table, slots, cos, sin, mask, D, WIDTH, BLOCK: tl.constexpr) -> None:
    """Write a token's position, angles and mask."""
    tl.store(slots + row, slot)
    _copy(cos_table, slot, cos, row, D, BLOCK)
    _copy(sin_table, slot, sin, row, D, BLOCK)
    _copy(mask_table, slot, mask, row, WIDTH, BLOCK)


@triton.jit
def _begin_kernel(
    tokens, known, drafts, embedding, cos_table, sin_table, mask_table, slots, cos, sin, mask, out, HIDDEN, D, WIDTH,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Prepare one token: the last known one, or a draft."""
    let_begin(EARLY)
    row = tl.program_id(0)
    slot = tl.load(known) - 1 + row
    token = tl.load(tokens + slot, mask=row == 0, other=0) + tl.load(drafts + row - 1, mask=row > 0, other=0)
    _copy(embedding, token, out, row, HIDDEN, BLOCK)
    _place(slot, row, cos_table, sin_table, mask_table, slots, cos, sin, mask, D, WIDTH, BLOCK)


@triton.jit
def _settle_kernel(
    best, first, second, size, tie, given, slots, tokens, known, going, drafts, before, accepted, following, last, told, kept,
    cos_table, sin_table, mask_table, next_slots, cos, sin, mask, HIDDEN, D, WIDTH, K: tl.constexpr, PADDED: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Judge drafts, write the new tokens, take what a chain reads.

    The first program writes what the step gives; the next ones a chain's positions each; the others keep hidden states.
    """
    wait(EARLY)
    let_begin(EARLY)
    part, place = tl.program_id(0), tl.arange(0, PADDED)
    start = tl.load(slots)
    chosen = tl.load(best + place, mask=place <= K, other=-1)
    drafted = tl.load(drafts + place, mask=place < K, other=-2)
    right = tl.min(tl.where(chosen == drafted, PADDED, place), axis=0)
    if part == 0:
        after = tl.sum(tl.where(place == right, chosen, 0), axis=0)
        length = tl.load(known)
        largest = tl.load(first + place, mask=place <= K, other=0.0)
        other = tl.load(second + place, mask=place <= K, other=0.0)
        tied = largest - other <= tie * tl.load(size + place, mask=place <= K, other=0.0)
        tl.store(before + place, drafted, mask=place < K)
        tl.store(accepted, right.to(tl.int64))
        tl.store(following, after)
        tl.store(last, start + right)
        # the places after the accepted ones hold rejected drafts until the next step writes them
        new = tl.where((place == right) | (place == K), after, drafted)
        tl.store(tokens + length + place, new, mask=place <= K)
        tl.store(known, length + (right + 1) * tl.load(going))
        # through all caches: the CPU looks at it meanwhile
        tl.store(told + place, drafted, mask=place < K, cache_modifier=".wt")
        tl.store(told + K, after, cache_modifier=".wt")
        tl.store(told + K + 1, right.to(tl.int64), cache_modifier=".wt")
        tl.store(told + K + 2 + place, tied.to(tl.int64), mask=place <= K, cache_modifier=".wt")
    elif part <= WINDOW:
        # in a short row the first position comes several times, and is the same each time
        slot = tl.maximum(start + right - WINDOW + part, 0)
        _place(slot, part - 1, cos_table, sin_table, mask_table, next_slots, cos, sin, mask, D, WIDTH, BLOCK)
    else:
        row = part - 1 - WINDOW
        _copy(given + row * HIDDEN, 0, kept + (start + row) * HIDDEN, 0, HIDDEN, BLOCK)


@triton.jit
def _rows_at(x, at, there, K: tl.constexpr, WIDE: tl.constexpr):
    """Read some rows' numbers, zeros where none is."""
    k = tl.arange(0, WIDE)[None, None, :]
    pieces = ()
    for start in tl.static_range(0, K, WIDE):
        inside = there[:, None, None] & (start + k < K)
        pieces = pieces + (tl.load(x + at[:, None, None] * K + start + k, mask=inside, other=0.0).to(tl.float32),)
    return pieces


@triton.jit
def _join_kernel(
    hidden, slots, tokens, known, drafts, embedding, output_norm, output_eps, hidden_norm, hidden_eps, embedding_norm,
    embedding_eps, weight, out, N, AHEAD: tl.constexpr, FIRST: tl.constexpr, NORMED: tl.constexpr, SWAPPED: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """``[norm(hidden); norm(embedding)] weight'``.

    The tokens are AHEAD of their positions: known ones, or drafts.
    """
    PIECES: tl.constexpr = (K + WIDE - 1) // WIDE
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    if SWAPPED:
        first = tiles_of(weight + K, n, hidden_norm, 2 * K, K, WIDE, True)
        second = tiles_of(weight, n, embedding_norm, 2 * K, K, WIDE, True)
    else:
        first = tiles_of(weight, n, hidden_norm, 2 * K, K, WIDE, True)
        second = tiles_of(weight + K, n, embedding_norm, 2 * K, K, WIDE, True)
    wait(EARLY)
    let_begin(EARLY)
    place = tl.arange(0, PADDED)
    there = place < ROWS
    slot = tl.load(slots + place, mask=there, other=0)
    behind = slot + AHEAD - tl.load(known)
    token = tl.load(tokens + slot + AHEAD, mask=there & (behind < 0), other=0)
    token += tl.load(drafts + behind, mask=there & (behind >= 0), other=0)
    one = _rows_at(hidden, slot if AHEAD == 1 else place, there, K, WIDE)
    other = _rows_at(embedding, token, there & (slot >= FIRST), K, WIDE)
    if NORMED:
        one = normed(one, output_norm, output_eps, PADDED, K, PIECES, WIDE)
    result = product(one, first, PADDED, OUTPUTS, PIECES, WIDE) * scale_of(one, hidden_eps, PADDED, K, PIECES, WIDE)
    result += product(other, second, PADDED, OUTPUTS, PIECES, WIDE) * scale_of(other, embedding_eps, PADDED, K, PIECES, WIDE)
    row = place[:, None]
    tl.store(out + row * N + n[None, :], result.to(out.dtype.element_ty), mask=row < ROWS)


def begin(tokens: Tensor, known: Tensor, drafts: Tensor, embedding: Tensor, tables: Tables, into: Rows) -> Tensor:
    """Prepare the reading of a text's last known token and K drafts.

    Args:
        tokens: ``[1, L]``.
        known: ``[1]``, how many of them are known.
        drafts: ``[1, K]``.
        embedding: ``[V, D]``, contiguous.
        tables: of all positions.
        into: ``1 + K`` tokens, written.

    Returns:
        their embeddings ``[1, 1 + K, D]``.
    """
    count, width = 1 + drafts.shape[1], embedding.shape[1]
    out = embedding.new_empty(1, count, width)
    options = early(out)
    options.pop("launch_pdl", None)  # the first kernel of a step: nothing is before it
    kernel: Any = _begin_kernel
    kernel[(count,)](
        tokens, known, drafts if count > 1 else tokens, embedding, tables.cos, tables.sin, tables.mask, into.slots, into.cos,
        into.sin, into.mask, out, width, tables.cos.shape[1], tables.mask.shape[1], BLOCK=_BLOCK, num_warps=4, **options,
    )  # fmt: skip
    return out


@frozen(eq=False)
class Judged:
    """Results of `settle`.

    Args:
        before: ``[1, K]``, the drafts that were read.
        accepted, following, last: ``[1]``: how many of them are right, the token after these, and the position before it.
        told: ``[K + 2 + 1 + K]``, which the CPU reads: drafts, ``following``, ``accepted``, and which places are tied.
    """

    before: Tensor
    accepted: Tensor
    following: Tensor
    last: Tensor
    told: Tensor


def settle(
    found: tuple[Tensor, Tensor, Tensor, Tensor], tie: float, slots: Tensor, text: tuple[Tensor, Tensor, Tensor],
    drafts: Tensor, into: Judged, tables: Tables, kept: tuple[Tensor, Tensor] | None, window: Rows | None,
) -> None:  # fmt: skip
    """Judge drafts, write the new tokens, take what a chain reads.

    Args:
        found: see `wmtp.models.head_kernels.best_two`, of ``1 + K`` tokens.
        tie: logits closer than this share of the largest one count as tied.
        slots: ``[1, 1 + K]``, their positions.
        text: its tokens ``[1, L]`` and how many are known ``[1]``, both changed; and ``[1]``, 0 where it is finished.
        drafts: ``[1, K]``.
        into: written.
        tables: of all positions.
        kept: hidden states ``[1, 1 + K, D]``, and where those of all positions are kept, ``[1, L, D]``; None: nowhere.
        window: the last positions that count, written; None: nothing reads them.
    """
    tokens, known, going = text
    count = drafts.shape[1]
    given, target = (found[1], found[1]) if kept is None else kept
    rows = window or Rows(slots, tables.cos, tables.sin, tables.mask)
    wide, hidden = 0 if window is None else window.slots.shape[1], given.shape[-1]
    kernel: Any = _settle_kernel
    kernel[(1 + wide + (0 if kept is None else 1 + count),)](
        *found, tie, given, slots, tokens, known, going, drafts if count else slots, into.before if count else slots,
        into.accepted, into.following, into.last, into.told, target, tables.cos, tables.sin, tables.mask, rows.slots, rows.cos,
        rows.sin, rows.mask, hidden, tables.cos.shape[1], tables.mask.shape[1], K=count,
        PADDED=triton.next_power_of_2(1 + count), WINDOW=wide, BLOCK=_BLOCK, num_warps=4, **early(known),
    )  # fmt: skip


def join_tokens(
    hidden: Tensor, ahead: int, slots: Tensor, text: tuple[Tensor, Tensor, Tensor], embedding: Tensor,
    norms: tuple[Norm | None, Norm, Norm], weight: Tensor, rule: ChainRule,
) -> Tensor:  # fmt: skip
    """Multiply norms of hidden states and of embeddings by a weight.

    Args:
        hidden: of step ``ahead`` − 1, ``[1, W, D]``; for the first step of all positions, ``[1, L, D]``.
        ahead: by so many positions the tokens are ahead.
        slots: ``[1, W]``.
        text: its tokens ``[1, L]``, how many are known ``[1]``, and drafts ``[1, K]`` after these.
        embedding: ``[V, D]``, contiguous.
        norms: of ``hidden`` as it is (None: none); then of both for the product.
        weight: ``[N, 2 D]``.
        rule: of the order in ``weight``, and of position 0.

    Returns:
        ``[1, W, N]``.
    """
    count, width = slots.shape[1], embedding.shape[1]
    before, *others = norms
    out, shape = hidden.new_empty(1, count, len(weight)), shape_of("join", count)
    kernel: Any = _join_kernel
    kernel[(len(weight) // shape["OUTPUTS"],)](
        hidden, slots, *text, embedding, *(before or others[0]), *others[0], *others[1], weight, out, len(weight), AHEAD=ahead,
        FIRST=int(rule.zero_first and ahead == 1), NORMED=before is not None, SWAPPED=rule.embedding_first, K=width, **shape,
        **early(hidden),
    )  # fmt: skip
    return out

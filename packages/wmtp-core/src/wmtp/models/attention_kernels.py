"""Triton kernels of attention for few tokens.

A program has one query. It reads keys and values of earlier steps while the query is made.

A single query has threads to spare: four have a slot, and all slots are read at once. Tiles are ``[8 slots, warps, 16 numbers
of a head]``, for keys and values alike, so that only sums move between threads.
"""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001, RUF005 - nor does it know a starred tuple
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from wmtp.models.product_kernels import eager, let_begin, wait

__all__ = ["attend"]

#: one query: for so many slots of the cache the warps, and programs that share its result
_SHAPES: Final = ((256, 8, 2), (512, 16, 4))

#: several: slots that a program looks at before it waits, and warps
_BLOCK: Final = 256
_ATTENDING: Final = 8


@triton.jit
def _one_kernel(
    query, keys, values, mask, slots, out, scale, cache_row, cache_head, mask_row, mask_token, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr,
    EARLY: tl.constexpr, EAGER: tl.constexpr,
) -> None:  # fmt: skip
    """Attention of a single query, some numbers of its result.

    The slots before the tokens of this step were written by steps before: they are read while the queries are made.
    """
    PARTS: tl.constexpr = D // 16
    MINE: tl.constexpr = PARTS // SPLIT
    let_begin(EAGER)
    split = tl.program_id(0) % SPLIT
    head, row = tl.program_id(0) // SPLIT % HEADS, tl.program_id(0) // SPLIT // HEADS
    batch, token = row // TOKENS, row % TOKENS
    begin = tl.load(slots + batch * TOKENS).to(tl.int32)
    end = tl.load(slots + row).to(tl.int32) + 1
    keys += batch * cache_row + head // GROUPS * cache_head
    values += batch * cache_row + head // GROUPS * cache_head + split * MINE * 16
    mask += batch * mask_row + token * mask_token
    slot = tl.arange(0, 8)[:, None] + tl.arange(0, WARPS)[None, :] * 8
    number = tl.arange(0, 16)[None, None, :]
    key, value, added = (), (), ()
    for chunk in tl.static_range(CHUNKS):
        place = chunk * WARPS * 8 + slot
        inside, old = place[:, :, None] * D + number, (place < begin)[:, :, None]
        for part in tl.static_range(PARTS):
            key = key + (tl.load(keys + inside + part * 16, mask=old, other=0.0),)
        for part in tl.static_range(MINE):
            value = value + (tl.load(values + inside + part * 16, mask=old, other=0.0),)
        added = added + (tl.load(mask + place, mask=place < end, other=0.0).to(tl.float32),)
    wait(EARLY)
    if not EAGER:
        let_begin(EARLY)
    asked = ()
    for part in tl.static_range(PARTS):
        same = tl.zeros([8, WARPS, 16], tl.int32)
        asked = asked + (tl.load(query + (row * HEADS + head) * D + part * 16 + number + same).to(tl.float32) * scale,)
    scores, now_value = (), ()
    for chunk in tl.static_range(CHUNKS):
        place = chunk * WARPS * 8 + slot
        inside, new = place[:, :, None] * D + number, ((place >= begin) & (place < end))[:, :, None]
        sums = tl.zeros([8, WARPS, 16], tl.float32)
        for part in tl.static_range(PARTS):
            sums += tl.load(keys + inside + part * 16, mask=new, other=key[chunk * PARTS + part]).to(tl.float32) * asked[part]
        for part in tl.static_range(MINE):
            now_value = now_value + (tl.load(values + inside + part * 16, mask=new, other=value[chunk * MINE + part]),)
        # a query that sees nothing, as padding, gets some finite result
        score = tl.where(place < end, tl.maximum(tl.sum(sums, axis=2) + added[chunk], -3.0e38), -float("inf"))
        scores = scores + (score,)
    most = scores[0]
    for chunk in tl.static_range(1, CHUNKS):
        most = tl.maximum(most, scores[chunk])
    largest = tl.max(tl.max(most, axis=0), axis=0)
    weights = ()
    total = tl.zeros([8, WARPS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        weight = tl.exp(scores[chunk] - largest)
        weights = weights + (weight,)
        total += weight
    whole = tl.sum(tl.sum(total, axis=0), axis=0)
    results = ()
    for part in tl.static_range(MINE):
        sums = tl.zeros([8, WARPS, 16], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            sums += now_value[chunk * MINE + part].to(tl.float32) * weights[chunk][:, :, None]
        results = results + (tl.sum(sums, axis=0),)
    out += (row * HEADS + head) * D + split * MINE * 16
    # four parts at once: the warps' sums are added up once, not four times
    for first in tl.static_range(0, MINE, 4):
        if MINE - first >= 4:
            four = tl.join(tl.join(results[first], results[first + 1]), tl.join(results[first + 2], results[first + 3]))
            low, high = tl.arange(0, 2)[None, :, None], tl.arange(0, 2)[None, None, :]
            place = first * 16 + tl.arange(0, 16)[:, None, None] + low * 16 + high * 32
            tl.store(out + place, (tl.sum(four, axis=0) / whole).to(out.dtype.element_ty))
        else:
            for part in tl.static_range(first, MINE):
                result = tl.sum(results[part], axis=0) / whole
                tl.store(out + part * 16 + tl.arange(0, 16), result.to(out.dtype.element_ty))


@triton.jit
def _several_kernel(
    query, keys, values, mask, slots, out, scale, cache_row, cache_head, mask_row, mask_token,
    TOKENS: tl.constexpr, NEW: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr, EARLY: tl.constexpr, EAGER: tl.constexpr,
) -> None:  # fmt: skip
    """Attention of one of several queries, with a running softmax.

    Keys of the first slots are read in four parts: a thread has several numbers of a key, and few of them add up.
    """
    PART: tl.constexpr = D // 4
    let_begin(EAGER)
    head, row = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    batch, token = row // TOKENS, row % TOKENS
    d, place = tl.arange(0, D)[None, :], tl.arange(0, BLOCK)
    begin = tl.load(slots + batch * TOKENS).to(tl.int32)
    end = tl.load(slots + row).to(tl.int32) + 1
    cached = batch * cache_row + head // GROUPS * cache_head
    masked = mask + batch * mask_row + token * mask_token
    there = place < begin
    inside = cached + place[:, None] * D + d
    part = tl.arange(0, PART)[None, :]
    key = ()
    for p in tl.static_range(4):
        piece = keys + cached + place[:, None] * D + p * PART + part
        key = key + (tl.load(piece, mask=there[:, None], other=0.0).to(tl.float32),)
    value = tl.load(values + inside, mask=there[:, None], other=0.0).to(tl.float32)
    added = tl.load(masked + place, mask=there, other=-float("inf")).to(tl.float32)
    new = begin + tl.arange(0, NEW)
    new_there = new < end
    new_added = tl.load(masked + new, mask=new_there, other=-float("inf")).to(tl.float32)
    wait(EARLY)
    if not EAGER:
        let_begin(EARLY)
    query += (row * HEADS + head) * D
    asked = tl.load(query + d).to(tl.float32) * scale
    products = key[0] * (tl.load(query + part).to(tl.float32) * scale)
    for p in tl.static_range(1, 4):
        products += key[p] * (tl.load(query + p * PART + part).to(tl.float32) * scale)
    new_inside = cached + new[:, None] * D + d
    new_key = tl.load(keys + new_inside, mask=new_there[:, None], other=0.0).to(tl.float32)
    new_value = tl.load(values + new_inside, mask=new_there[:, None], other=0.0).to(tl.float32)
    # a query that sees nothing, as padding, gets some finite result
    scores = tl.where(there, tl.maximum(tl.sum(products, axis=1) + added, -3.0e38), -float("inf"))
    new_scores = tl.where(new_there, tl.maximum(tl.sum(new_key * asked, axis=1) + new_added, -3.0e38), -float("inf"))
    largest = tl.maximum(tl.max(scores, axis=0), tl.max(new_scores, axis=0))
    weights, new_weights = tl.exp(scores - largest), tl.exp(new_scores - largest)
    total = tl.sum(weights, axis=0) + tl.sum(new_weights, axis=0)
    sums = tl.sum(value * weights[:, None], axis=0) + tl.sum(new_value * new_weights[:, None], axis=0)
    if LOOP:
        for first in range(BLOCK, begin, BLOCK):
            more = first + place
            more_there = more < begin
            more_inside = cached + more[:, None] * D + d
            more_key = tl.load(keys + more_inside, mask=more_there[:, None], other=0.0).to(tl.float32)
            more_value = tl.load(values + more_inside, mask=more_there[:, None], other=0.0).to(tl.float32)
            more_added = tl.load(masked + more, mask=more_there, other=-float("inf")).to(tl.float32)
            more_scores = tl.maximum(tl.sum(more_key * asked, axis=1) + more_added, -3.0e38)
            more_scores = tl.where(more_there, more_scores, -float("inf"))
            now = tl.maximum(largest, tl.max(more_scores, axis=0))
            more_weights = tl.exp(more_scores - now)
            fading = tl.exp(largest - now)
            total = total * fading + tl.sum(more_weights, axis=0)
            sums = sums * fading + tl.sum(more_value * more_weights[:, None], axis=0)
            largest = now
    tl.store(out + (row * HEADS + head) * D + tl.arange(0, D), (sums / total).to(out.dtype.element_ty))


def attend(query: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Attend to the cache.

    Args:
        query: ``[B, T, heads, d]``, contiguous.
        cache: keys and values, ``[B, shared heads, S, d]``, contiguous.
        mask: ``[B, 1, T, ≤ S]``, added to the scores.
        slots: ``[B, T]``, contiguous, the queries' own, one after the other in each row; they see none behind it.
        scale: of the scores.

    Returns:
        ``[B, T, heads d]``.
    """
    rows, tokens, heads, d = query.shape
    keys, values = cache
    out = torch.empty_like(query)
    shape: dict[str, Any] = {"TOKENS": tokens, "HEADS": heads, "GROUPS": heads // keys.shape[1], "D": d}
    if rows * tokens == 1:
        most, warps, programs = next(
            (shape for shape in _SHAPES if mask.shape[3] <= shape[0]), (mask.shape[3], *_SHAPES[-1][1:])
        )
        kernel: Any = _one_kernel
        shape |= {"WARPS": warps, "CHUNKS": triton.cdiv(most, 8 * warps), "SPLIT": programs}
    else:
        kernel, warps, programs = _several_kernel, _ATTENDING, 1
        shape |= {"NEW": triton.next_power_of_2(tokens), "BLOCK": _BLOCK, "LOOP": mask.shape[3] > _BLOCK}
    kernel[(rows * tokens * heads * programs,)](
        query, keys, values, mask, slots, out, scale, keys.stride(0), keys.stride(1), mask.stride(0), mask.stride(2),
        **shape, num_warps=warps, **eager(query, several=True),
    )  # fmt: skip
    return out.flatten(2)

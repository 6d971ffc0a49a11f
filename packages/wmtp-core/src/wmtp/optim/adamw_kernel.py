"""Triton kernel of `wmtp.optim.master_adamw`."""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["adamw_kernel"]


@triton.jit
def adamw_kernel(
    table,
    count,
    owners,
    firsts,
    corrections,
    clip,
    lr,
    decay,
    keep_mean,
    add_mean,
    keep_square,
    add_square,
    eps,
    HALF: tl.constexpr,
    PUBLISH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Run one step of AdamW for one block of many parameters.

    Everything is read once and written once. Rows of ``table`` are the addresses of master copies, parameters, gradients, means
    and squares, and sizes, ``count`` of each; ``owners`` has the parameter of each block, and ``firsts`` its first block.
    ``corrections`` has 1 − β₁ᵗ and 1 − β₂ᵗ of each, ``clip`` what gradients are multiplied by, ``decay`` 1 − lr · weight decay.
    Gradients are bf16 with ``HALF``, fp32 otherwise. With ``PUBLISH`` the new value is rounded into the bf16 parameter. With
    ``ALIGNED`` all addresses and sizes are multiples of 16.
    """
    block = tl.program_id(0)
    owner = tl.load(owners + block)
    at = (block - tl.load(firsts + owner)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(table + 5 * count + owner)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    inside = at < size
    master = _numbers(table + owner, at, tl.float32, ALIGNED)
    gradient = _numbers(table + 2 * count + owner, at, tl.bfloat16 if HALF else tl.float32, ALIGNED)
    mean = _numbers(table + 3 * count + owner, at, tl.float32, ALIGNED)
    square = _numbers(table + 4 * count + owner, at, tl.float32, ALIGNED)
    corrected = corrections + 2 * owner
    g = tl.load(gradient, mask=inside, other=0.0).to(tl.float32) * tl.load(clip)
    m = keep_mean * tl.load(mean, mask=inside, other=0.0) + add_mean * g
    v = keep_square * tl.load(square, mask=inside, other=0.0) + add_square * g * g
    step = lr / tl.load(corrected) * m / (tl.sqrt(v) / tl.sqrt(tl.load(corrected + 1)) + eps)
    w = decay * tl.load(master, mask=inside, other=0.0) - step
    tl.store(mean, m, mask=inside)
    tl.store(square, v, mask=inside)
    tl.store(master, w, mask=inside)
    if PUBLISH:
        tl.store(_numbers(table + count + owner, at, tl.bfloat16, ALIGNED), w.to(tl.bfloat16), mask=inside)


@triton.jit
def _numbers(place, at, KIND: tl.constexpr, ALIGNED: tl.constexpr):  # noqa: ANN202
    """Point at numbers whose address stands at ``place``."""
    pointers = tl.load(place).to(tl.pointer_type(KIND)) + at
    return tl.multiple_of(pointers, 16) if ALIGNED else pointers

"""Triton kernel of `wmtp.optim.master_adamw`."""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["adamw_kernel"]


@triton.jit
def adamw_kernel(
    master,
    parameter,
    gradient,
    mean,
    square,
    corrections,
    clip,
    lr,
    decay,
    keep_mean,
    add_mean,
    keep_square,
    add_square,
    eps,
    size,
    PUBLISH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Run one step of AdamW for a block of one parameter.

    Everything is read once and written once. ``corrections`` has 1 − β₁ᵗ and 1 − β₂ᵗ, ``clip`` what gradients are multiplied
    by, ``decay`` 1 − lr · weight decay. With ``PUBLISH`` the new value is rounded into ``parameter``.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * tl.load(clip)
    m = keep_mean * tl.load(mean + at, mask=inside, other=0.0) + add_mean * g
    v = keep_square * tl.load(square + at, mask=inside, other=0.0) + add_square * g * g
    step = lr / tl.load(corrections) * m / (tl.sqrt(v) / tl.sqrt(tl.load(corrections + 1)) + eps)
    w = decay * tl.load(master + at, mask=inside, other=0.0) - step
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(master + at, w, mask=inside)
    if PUBLISH:
        tl.store(parameter + at, w.to(parameter.dtype.element_ty), mask=inside)

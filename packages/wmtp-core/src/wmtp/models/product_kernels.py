"""Products of few rows in Triton: parts of a decoding step's kernels.

A program has a few rows of a weight, which it holds in registers and uses for all tokens. It reads them before it waits for the
kernel before, where the device can start a kernel before that one has ended (from Hopper on). What the tokens bring is read
after it, and all of it before anything is written: otherwise each token would wait until the one before it is written.
"""

# Triton reads the annotations of a kernel as its own types
# ruff: noqa: ANN001, ANN201, RUF005 - nor does it know a starred tuple
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "dot",
    "eager",
    "early",
    "let_begin",
    "product",
    "rows_of",
    "scale_of",
    "shape_of",
    "tiles_of",
    "wait",
    "whole_rows",
    "whole_tokens",
]

#: for one token and for several: rows of a weight that a program has, columns that it reads at a time, and warps
_SHAPES: Final = {
    "project": ((2, 256, 2), (1, 128, 1)),
    "out": ((2, 128, 1), (2, 128, 1)),
    "down": ((4, 512, 4), (2, 512, 4)),
    "join": ((2, 256, 2), (2, 256, 2)),
    "best": ((8, 128, 1), (8, 128, 1)),
}


@triton.jit
def wait(EARLY: tl.constexpr) -> None:
    """Wait for the kernel before."""
    if EARLY:
        gdc_wait()


@triton.jit
def let_begin(EARLY: tl.constexpr) -> None:
    """Let the next kernel begin to read its weights."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def tiles_of(weight, n, norm, STRIDE: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr):
    """Read columns of a weight's rows, scaled by the norm's weight."""
    k = tl.arange(0, WIDE)[None, None, :]
    rows = n[None, :, None] * STRIDE
    tiles = ()
    for start in tl.static_range(0, K, WIDE):
        if start + WIDE <= K:
            tile = tl.load(weight + rows + start + k).to(tl.float32)
            if NORM:
                tile = tile * tl.load(norm + start + k).to(tl.float32)
        else:
            inside = (start + k) < K
            tile = tl.load(weight + rows + start + k, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                tile = tile * tl.load(norm + start + k, mask=inside, other=0.0).to(tl.float32)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def rows_of(x, ROWS: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """Read all tokens' numbers.

    Before any result is written: they may be read in any order.
    """
    row, k = tl.arange(0, PADDED)[:, None, None], tl.arange(0, WIDE)[None, None, :]
    pieces = ()
    for start in tl.static_range(0, K, WIDE):
        if start + WIDE <= K and ROWS == PADDED:
            piece = tl.load(x + row * K + start + k).to(tl.float32)
        else:
            piece = tl.load(x + row * K + start + k, mask=(row < ROWS) & (start + k < K), other=0.0).to(tl.float32)
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def product(given, tiles, PADDED: tl.constexpr, OUTPUTS: tl.constexpr, PIECES: tl.constexpr, WIDE: tl.constexpr):
    """Multiply tokens by a weight's rows: ``[tokens, outputs]``."""
    sums = tl.zeros([PADDED, OUTPUTS, WIDE], tl.float32)
    for piece in tl.static_range(PIECES):
        sums += given[piece] * tiles[piece]
    return tl.sum(sums, axis=2)


@triton.jit
def scale_of(given, eps, PADDED: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, WIDE: tl.constexpr):
    """Return an RMS norm's factor for each token, ``[tokens, 1]``."""
    squares = tl.zeros([PADDED, 1, WIDE], tl.float32)
    for piece in tl.static_range(PIECES):
        squares += given[piece] * given[piece]
    return tl.rsqrt(tl.sum(squares, axis=2) / K + eps)


@triton.jit
def whole_rows(weight, n, norm, K: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr):
    """Read a row of a weight for each warp.

    In pieces ``[columns, warps]``, scaled by the norm's weight.
    """
    tiles = ()
    for start in tl.static_range(0, K, WIDE):
        k = start + tl.arange(0, WIDE)[:, None]
        tile = tl.load(weight + n[None, :] * K + k).to(tl.float32)
        if NORM:
            tile = tile * tl.load(norm + k + n[None, :] * 0).to(tl.float32)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def whole_tokens(x, ROWS: tl.constexpr, K: tl.constexpr, WARPS: tl.constexpr, WIDE: tl.constexpr):
    """Read all tokens' numbers, the same for each warp.

    In pieces ``[columns, warps]``, one token after the other.
    """
    pieces = ()
    for row in tl.static_range(ROWS):
        for start in tl.static_range(0, K, WIDE):
            k = start + tl.arange(0, WIDE)[:, None] + tl.arange(0, WARPS)[None, :] * 0
            pieces = pieces + (tl.load(x + row * K + k).to(tl.float32),)
    return pieces


@triton.jit
def dot(given, token: tl.constexpr, tiles, row: tl.constexpr, PIECES: tl.constexpr):
    """Multiply a token by a row of each warp: ``[1, warps]``."""
    sums = given[token * PIECES] * tiles[row * PIECES]
    for piece in tl.static_range(1, PIECES):
        sums += given[token * PIECES + piece] * tiles[row * PIECES + piece]
    return tl.sum(sums, axis=0)[None, :]


def shape_of(kernel: str, rows: int) -> dict[str, int]:
    """Return a kernel's options: its rows, and the size of a program."""
    outputs, wide, warps = _SHAPES[kernel][rows > 1]
    return {"ROWS": rows, "PADDED": triton.next_power_of_2(rows), "OUTPUTS": outputs, "WIDE": wide, "num_warps": warps}


def early(x: Tensor) -> dict[str, Any]:
    """Return whether a kernel begins before the last one has ended."""
    can = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"EARLY": can} | ({"launch_pdl": True} if can else {})


def eager(x: Tensor, *, several: bool = False) -> dict[str, Any]:
    """Return `early`, and whether the next kernel begins with this one.

    Args:
        x: ``[B, T, …]``.
        several: whether it does with several tokens too, whose sums need registers that weights would take.
    """
    options = early(x)
    return options | {"EAGER": options["EARLY"] and (several or x.shape[0] * x.shape[1] == 1)}

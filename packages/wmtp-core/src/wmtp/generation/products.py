"""Products of few rows on a CPU.

A step of decoding multiplies one to a few tokens by each weight, which should take as long as reading the weight from memory.
MKL, with which torch multiplies fp32 on x86, takes two to eight times as long for ``rows @ weight.T``. The same product as
``weight @ rows.T`` takes another of its kernels, which does not, as long as the rows fit into the fastest cache; a single row
is multiplied faster as two. Nothing is packed or kept. docs/notes/performance.md has the figures.

This was seen on AMD's CPUs with AVX-512, and there alone it is done. The choice rests on the machine and the shapes, not on a
trial that times both, so that a machine gives the same numbers each time. The results differ from the usual ones by rounding
only, as those of one row and of several do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from attrs import asdict, define
from torch import Tensor, nn
from torch.nn import functional as F

from wmtp.loss import Unembedding

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["fast_products", "fast_unembedding", "multiply"]

#: most numbers of all rows together: beyond 14 KiB of fp32, half of a core's fastest cache, MKL's other kernel is faster
_MOST_NUMBERS: Final = 3584

#: fewest numbers of a weight: for smaller ones, calling torch takes longer than multiplying
_FEWEST: Final = 2**16

#: fewest numbers of all weights: 64 MiB, since weights that stay in a cache are multiplied faster the usual way
_FEWEST_IN_ALL: Final = 2**24


def multiply(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `torch.nn.functional.linear` does, up to rounding.

    Args:
        given: ``[..., D]``.
        weight: ``[O, D]``.
        bias: ``[O]``.
    """
    width = given.shape[-1]
    rows = given.numel() // width
    if not rows or max(rows, 2) * width > _MOST_NUMBERS:
        return F.linear(given, weight, bias)
    flat = given.reshape(rows, width)
    if rows == 1:
        flat = torch.cat([flat, flat])
    product = torch.mm(weight, flat.t())[:, :rows].t()
    if bias is not None:
        product = product + bias
    # layers may view what they get in any shape
    return product.contiguous().view(*given.shape[:-1], weight.shape[0])


@contextmanager
def fast_products(model: MTPModel) -> Iterator[None]:
    """Let linear layers use `multiply` inside the context, where it is faster."""
    if not _pays(model):
        yield
        return
    layers = [layer for layer in _layers(model) if "forward" not in vars(layer)]
    try:
        for layer in layers:  # an attribute of the instance hides the method of the class
            vars(layer)["forward"] = functools.partial(_forward, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def fast_unembedding(model: MTPModel, head: int) -> Unembedding:
    """Return a head's unembedding, which uses `multiply` where that is faster."""
    unembedding = model.unembedding(head)
    if not _pays(model) or not _fits(unembedding.weight):
        return unembedding
    return _FastUnembedding(**asdict(unembedding, recurse=False))


@define(kw_only=True, eq=False, slots=False)
class _FastUnembedding(Unembedding):
    """An `Unembedding` for few rows."""

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Unembedding.logits`."""
        return self.transform(multiply(hidden, self.weight, self.bias))


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:  # torch's name, which a caller may write
    return multiply(input, layer.weight, layer.bias)


def _layers(model: nn.Module) -> list[nn.Linear]:
    """List the plain linear layers.

    A subclass may pack its weight or share it out.
    """
    return [layer for layer in model.modules() if type(layer) is nn.Linear and _fits(layer.weight)]


def _fits(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.is_contiguous() and weight.numel() >= _FEWEST and 2 * weight.shape[1] <= _MOST_NUMBERS


def _pays(model: MTPModel) -> bool:
    """Tell whether `multiply` is faster for a model on this machine."""
    if model.anatomy.output.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not _has_both_kernels():
        return False
    return sum(layer.weight.numel() for layer in _layers(model)) >= _FEWEST_IN_ALL


@functools.cache
def _has_both_kernels() -> bool:
    """Tell whether torch uses MKL on an AMD CPU with AVX-512."""
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return False

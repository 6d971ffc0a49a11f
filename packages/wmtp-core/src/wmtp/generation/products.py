"""Products of few rows on a CPU.

A step of decoding multiplies one to a few tokens by each weight, which should take as long as reading the weight from memory.
MKL, with which torch multiplies fp32 on x86, takes two to eight times as long for ``rows @ weight.T``. The same product as
``weight @ rows.T`` takes another of its kernels, which does not, as long as the rows fit into the fastest cache; a single row
is multiplied faster as two. Nothing is packed or kept. docs/notes/performance.md has the figures.

Other CPUs and libraries have other kernels. So both ways are timed once on the model's own weights, and the usual one stays
unless the other is clearly faster. The results differ by rounding only, as those of one row and of several do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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

#: how much faster it has to be
_GAIN: Final = 1.1

#: attribute of a model: the fewest rows that are multiplied so, by number of threads
_FOUND: Final = "_fewest_fast_rows"


def multiply(given: Tensor, weight: Tensor, bias: Tensor | None = None, *, fewest: int = 1) -> Tensor:
    """Return what `torch.nn.functional.linear` does, up to rounding.

    Args:
        given: ``[..., D]``.
        weight: ``[O, D]``.
        bias: ``[O]``.
        fewest: rows that are multiplied in the other order; fewer ones are not.
    """
    width = given.shape[-1]
    rows = given.numel() // width
    if rows < fewest or max(rows, 2) * width > _MOST_NUMBERS:
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
    fewest = _fewest_rows(model)
    if fewest is None:
        yield
        return
    layers = [layer for layer in _layers(model) if "forward" not in vars(layer)]
    try:
        for layer in layers:  # an attribute of the instance hides the method of the class
            vars(layer)["forward"] = partial(_forward, layer, fewest)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def fast_unembedding(model: MTPModel, head: int) -> Unembedding:
    """Return a head's unembedding, which uses `multiply` where that is faster."""
    unembedding, fewest = model.unembedding(head), _fewest_rows(model)
    if fewest is None or not _fits(unembedding.weight):
        return unembedding
    return _FastUnembedding(**asdict(unembedding, recurse=False), fewest=fewest)


@define(kw_only=True, eq=False, slots=False)
class _FastUnembedding(Unembedding):
    """An `Unembedding` for few rows."""

    fewest: int

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Unembedding.logits`."""
        return self.transform(multiply(hidden, self.weight, self.bias, fewest=self.fewest))


def _forward(layer: nn.Linear, fewest: int, input: Tensor) -> Tensor:  # torch's name, which a caller may write
    return multiply(input, layer.weight, layer.bias, fewest=fewest)


def _layers(model: nn.Module) -> list[nn.Linear]:
    """List the plain linear layers.

    A subclass may pack its weight or share it out.
    """
    return [layer for layer in model.modules() if type(layer) is nn.Linear and _fits(layer.weight)]


def _fits(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.is_contiguous() and weight.numel() >= _FEWEST and 2 * weight.shape[1] <= _MOST_NUMBERS


def _fewest_rows(model: MTPModel) -> int | None:
    """Return the fewest rows for which `multiply` is faster; None: none.

    Finding out reads 64 MiB twelve times; the result is kept on the model.
    """
    if model.anatomy.output.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    found: dict[int, int | None] = model.__dict__.setdefault(_FOUND, {})
    threads = torch.get_num_threads()
    if threads not in found:
        found[threads] = _time_both(_layers(model))
    return found[threads]


def _time_both(layers: list[nn.Linear]) -> int | None:
    weights, numbers = [], 0
    for layer in layers:
        if numbers < _FEWEST_IN_ALL:
            weights.append(layer.weight)
            numbers += layer.weight.numel()
    if numbers < _FEWEST_IN_ALL:
        return None
    if _gain(weights, 4) < _GAIN:
        return None
    return 1 if _gain(weights, 1) >= _GAIN else 2


def _gain(weights: list[Tensor], rows: int) -> float:
    """Time both ways for ``rows`` rows, and return the ratio.

    Where `multiply` does not take so many, it is as many as it takes.
    """
    given = {width: torch.ones(min(rows, _MOST_NUMBERS // width), width) for width in {len(weight[0]) for weight in weights}}
    with torch.no_grad():
        usual, other = (_fastest(way, weights, given) for way in (F.linear, multiply))
    return usual / other


def _fastest(way: Callable[..., Tensor], weights: list[Tensor], given: dict[int, Tensor]) -> float:
    """Return the seconds for all weights.

    Of three passes the fastest counts, for each weight.
    """
    fastest = [float("inf")] * len(weights)
    for _ in range(3):
        for place, weight in enumerate(weights):
            start = time.perf_counter()
            way(given[weight.shape[1]], weight)
            fastest[place] = min(fastest[place], time.perf_counter() - start)
    return sum(fastest)

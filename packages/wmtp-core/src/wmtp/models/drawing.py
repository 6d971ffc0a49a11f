"""Seeded random numbers of new models, the same on every machine.

Large tensors are drawn by several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wmtp.cores import usable_cores

__all__ = ["seeded"]

_aten = torch.ops.aten
#: in-place draws that put a value into every place of a tensor, whatever was there
_DRAWS = {_aten.normal_.default, _aten.uniform_.default}
#: operations whose result is the same tensor under another name
_SAME = {_aten.detach.default, _aten.alias.default}
#: numbers of a tensor from which on a thread of its own pays; smaller ones come from the seed's one stream, in order
_LARGE = 2**20
_MOST_THREADS = 16


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers on the CPU from ``seed`` inside.

    The random state outside, also of other devices, stays. A model is drawn twice where it is made: by the constructors of its
    modules, and by its own initializer. Draws of large tensors wait until something needs their numbers, or the context ends:
    those that were overwritten are never made, and the others run in threads, each from a seed of its own, so that their number
    changes nothing.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        with _Later() as later:
            yield
        later.draw()


class _Later(TorchDispatchMode):
    """Keeps back draws of large tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, tuple[Tensor, Callable[[], object]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS and kwargs.get("generator") is None and _is_large(args[0]):
            return self._keep(func, args)
        if self._waiting and func not in _SAME and any(_key(tensor) in self._waiting for tensor in _tensors(args, kwargs)):
            self.draw()
        return func(*args, **kwargs)

    def _keep(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        tensor: Tensor = args[0]
        draw = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self._waiting[_key(tensor)] = tensor, lambda: func(*args, generator=draw)
        return tensor

    def draw(self) -> None:
        """Make the draws that wait."""
        waiting, self._waiting = [make for _, make in self._waiting.values()], {}
        threads = min(len(waiting), usable_cores(), _MOST_THREADS)
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(_without_gradient, waiting))
        else:
            for make in waiting:
                _without_gradient(make)


def _without_gradient(make: Callable[[], object]) -> None:
    with torch.no_grad():  # each thread has a mode of its own
        make()


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))


def _is_large(tensor: Tensor) -> bool:
    """Tell a large tensor that has its storage for itself."""
    if tensor.device.type != "cpu" or tensor.numel() < _LARGE or not tensor.is_contiguous():
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.device.type == "cpu" else 0

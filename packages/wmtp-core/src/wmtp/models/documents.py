"""Recurrent layers, run over each document of a packed row separately.

A linear attention, a state space or a convolution hands on a state from token to token, whatever mask or positions it
gets. So its module is called with the documents as rows of their own, all those of about one length at once, and what it
gives is put back where the documents lie. All else of the layer, and attention, works on the packed row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import local
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

__all__ = ["DocumentRows", "StateKeeper", "by_document", "reading", "undo_by_document", "within_reading"]


@frozen(kw_only=True, eq=False)
class DocumentRows:
    """Where the documents of packed rows lie.

    Args:
        groups: of documents of about one length; each ``[n, L]``, the places in the flattened rows of n documents of at most L
            tokens. A shorter one repeats its last place.
        order: ``[B·S]``, for each place of the flattened rows, where it is in the flattened groups one after another.
        shape: B and S.
    """

    groups: tuple[Tensor, ...]
    order: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, position_ids: Tensor) -> DocumentRows:
        """Find the documents by their positions ``[B, S]``, from 0 in each.

        Waits for the device. Padding has position 0 all along; it counts as one document.
        """
        positions = position_ids.cpu()
        zero, following = positions == 0, torch.roll(positions, -1, dims=1)
        alone = torch.roll(zero, 1, dims=1) & (following != 1)  # inside of padding
        alone[:, 0] = False
        starts = (zero & ~alone).flatten()
        starts[:: positions.shape[1]] = True
        first = starts.nonzero()[:, 0]
        lengths = torch.diff(first, append=torch.tensor([starts.numel()]))
        classes = torch.log2(lengths.double()).ceil()  # lengths up to 1, 2, 4, 8 …: at most as many again are computed in vain
        groups, order, before = [], torch.empty_like(starts, dtype=torch.int64), 0
        for number in classes.unique():
            begin, length = first[classes == number], lengths[classes == number]
            longest = int(length.max())
            offset = torch.arange(longest)
            places = begin[:, None] + torch.minimum(offset, length[:, None] - 1)
            used = offset < length[:, None]
            order[places[used]] = before + used.flatten().nonzero()[:, 0]
            groups.append(places.to(position_ids.device))
            before += places.numel()
        rows, width = positions.shape
        return cls(groups=tuple(groups), order=order.to(position_ids.device), shape=(rows, width))

    def split(self, value: Any, group: Tensor) -> Any:
        """Split a module's argument into one row per document of a group.

        Raises:
            ValueError: it is a tensor that cannot be: a mask of tokens by tokens.
        """
        rows, width = self.shape
        if isinstance(value, tuple | list):
            return type(value)(self.split(item, group) for item in value)
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.shape[0] in (1, rows) and value.shape[1] == width:
            return value.expand(rows, *value.shape[1:]).flatten(0, 1)[group]
        if width in value.shape[1:]:
            raise ValueError(f"an argument of shape {list(value.shape)} cannot be divided by documents")
        return value

    def join(self, parts: list[Tensor]) -> Tensor:
        """Join what was computed for the groups into packed rows.

        ``[n, L, …]`` each to ``[B, S, …]``.
        """
        return torch.cat([part.flatten(0, 1) for part in parts])[self.order].unflatten(0, self.shape)


class StateKeeper(ABC):
    """Cache that keeps the states of parts of layers itself.

    They reach it by `by_document`.
    """

    @abstractmethod
    def run_part(self, module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a part that was called with this cache.

        Args:
            module: the part.
            plain: its own ``forward``.
            args, kwargs: of the call; this cache is among them.
        """


class _Reading(local):
    """Documents that a thread reads: another may train or measure another model.

    Set in ``__init__``: torch.compile guards a thread's own attributes, not those of the class.
    """

    def __init__(self) -> None:
        self.rows: DocumentRows | None = None


_reading = _Reading()


@contextmanager
def reading(rows: DocumentRows | None) -> Iterator[None]:
    """Set the documents that modules of `by_document` go by, inside.

    With None they go by rows as they are.
    """
    before, _reading.rows = _reading.rows, rows
    try:
        yield
    finally:
        _reading.rows = before


def within_reading(function: Callable[..., Any]) -> Callable[..., Any]:
    """Bind a function to the current documents.

    Recomputation in the backward pass needs it.
    """
    return function if _reading.rows is None else partial(_read_again, _reading.rows, function)


def _read_again(rows: DocumentRows, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with reading(rows):
        return function(*args, **kwargs)


def by_document(module: nn.Module) -> None:
    """Have ``module`` run over each document by itself inside `reading`.

    Its state dict stays.
    """
    if not isinstance(module.forward, partial):
        module.forward = partial(_forward, module, module.forward)


def undo_by_document(module: nn.Module) -> None:
    """Take back `by_document`."""
    vars(module).pop("forward", None)


def _forward(module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _reading.rows is None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, StateKeeper):
                return value.run_part(module, plain, args, kwargs)
        return plain(*args, **kwargs)
    return _forward_by_document(_reading.rows, plain, *args, **kwargs)


@torch.compiler.disable()  # as many shapes as there are lengths of documents
def _forward_by_document(rows: DocumentRows, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    outputs = []
    with reading(None):  # what is inside has documents as rows already
        for group in rows.groups:
            outputs.append(
                plain(*rows.split(args, group), **{name: rows.split(value, group) for name, value in kwargs.items()})
            )
    if isinstance(outputs[0], Tensor):
        return rows.join(outputs)
    return (rows.join([output[0] for output in outputs]), *(None for _ in outputs[0][1:]))

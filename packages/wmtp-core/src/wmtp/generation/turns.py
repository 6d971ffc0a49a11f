"""Turns of several threads at one model.

A step of decoding hangs hooks on modules, and a request puts the model into eval mode: other threads would see both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import torch

from wmtp.generation.products import fast_products
from wmtp.models.anatomy import eval_mode

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["Turns", "turns_of"]

_TURNS: Final[WeakKeyDictionary[MTPModel, Turns]] = WeakKeyDictionary()
_FIND: Final = Lock()


class Turns:
    """Requests at one model, of any threads.

    Between two steps of a stream its caller's code runs, perhaps in another thread: so a turn is a step, not a request.
    """

    def __init__(self) -> None:
        self._lock = RLock()  # an abandoned stream may be closed by the garbage collection of a thread that has the turn
        self._requests = 0
        self._prepared = ExitStack()

    @contextmanager
    def request(self, model: MTPModel) -> Iterator[None]:
        """Keep eval mode and fast products until the last request ends."""
        with self._lock:
            if self._requests:
                model.eval()  # which may have been undone between the steps of a stream
            else:
                self._prepared.enter_context(eval_mode(model))
                self._prepared.enter_context(fast_products(model))
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1
                if not self._requests:
                    self._prepared.close()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the model alone, and compute without gradients."""
        with self._lock, torch.no_grad():
            yield


def turns_of(model: MTPModel) -> Turns:
    """Return the turns at a model, one for all requests."""
    with _FIND:
        return _TURNS.setdefault(model, Turns())

"""CUDA graphs: functions recorded once, then replayed without Python."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["CannotReplayError", "Replay", "can_replay", "refuse_replay"]

log = logging.getLogger(__name__)
T = TypeVar("T")


class CannotReplayError(Exception):
    """Signal that a graph cannot hold a function.

    It waits for the device, say.
    """


class Replay(Generic[T]):
    """Function that is replayed from its second call on.

    What it reads and writes must stay where it is.

    Args:
        function: launches kernels and does not wait for them; its second result is the result of all later calls.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self._has_run = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T

    def __call__(self) -> T:
        """Run the function; the result's tensors are overwritten by the next call.

        Raises:
            CannotReplayError: a graph cannot hold it. Nothing has been run then.
        """
        if not self._has_run:  # libraries that it uses for the first time set themselves up
            self._has_run = True
            return self.function()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # graphs that are garbage must not be freed inside: the device does not allow it meanwhile
            collects = gc.isenabled()
            gc.disable()
            try:
                # other threads may use the device meanwhile, as one that fetches batches
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._result = self.function()
            except RuntimeError as error:
                raise CannotReplayError(" ".join(str(error).split("\n")[0].split())) from error
            finally:
                if collects:
                    gc.enable()
            self._graph = graph
        self._graph.replay()
        return self._result


def can_replay(model: MTPModel, device: torch.device) -> bool:
    """Tell whether a model's decoding is to be tried as a graph."""
    return device.type == "cuda" and not model.__dict__.get("_cannot_replay")


def refuse_replay(model: MTPModel, error: CannotReplayError) -> None:
    """Remember that a model's decoding cannot be replayed, and say so once."""
    model.__dict__["_cannot_replay"] = True
    log.info("%s decodes without CUDA graphs, several times slower for a small model: %s", type(model.base).__name__, error)

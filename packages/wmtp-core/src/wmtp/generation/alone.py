"""Next token of a row alone, without a cache, to decide ties."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from wmtp.generation.decoder import CachedDecoder
from wmtp.generation.replay import CannotReplayError, Replay, can_replay
from wmtp.models.step_cache import plain_layers

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["RowAlone"]

#: rows are padded to a multiple of so many tokens, which few graphs serve
_LENGTHS: Final = 64

#: longest row that is replayed; for longer ones launching kernels no longer takes most of the time
_LONGEST: Final = 1024


class RowAlone:
    """Head 1's choice after a row.

    It depends on the row's tokens and on nothing else. Each length would be compiled for itself, so layers run uncompiled; on a
    GPU a graph spares launching their kernels one by one, which takes as long as 20 steps of a small model.

    Args:
        model: in eval mode.
        decoder: reads the row.
        device: of the model.
    """

    def __init__(self, model: MTPModel, decoder: CachedDecoder, device: torch.device) -> None:
        self._model, self._decoder = model, decoder
        # states of layers that keep one are not padded: what decides must be the same with and without graphs
        self._pads = device.type == "cuda" and decoder.cache.holds_only_slots
        self._replays = self._pads and can_replay(model, device)
        self._ids = torch.zeros(1, _LONGEST, dtype=torch.int64, device=device)
        self._last = torch.zeros(1, dtype=torch.int64, device=device)
        self._graphs: dict[int, Replay[Tensor]] = {}  # by length

    def choose(self, ids: Tensor) -> Tensor:
        """Return the most probable token after a row ``[S]``."""
        with plain_layers():
            if not self._pads:
                return self._decoder.last_logits_alone(ids).argmax()
            length = -(-len(ids) // _LENGTHS) * _LENGTHS
            if length > min(_LONGEST, self._model.max_positions or _LONGEST):
                return self._decoder.last_logits_alone(ids).argmax()
            self._ids.zero_()
            self._ids[0, : len(ids)] = ids
            self._last.fill_(len(ids) - 1)
            if self._replays:
                try:
                    return self._graphs.setdefault(length, Replay(partial(self._padded, length)))()
                except CannotReplayError:
                    self._replays = False
            return self._padded(length)

    def _padded(self, length: int) -> Tensor:
        return self._decoder.last_logits_alone(self._ids[0, :length], self._last).argmax()

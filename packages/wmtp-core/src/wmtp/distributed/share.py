"""Which rows of an optimizer step a rank computes."""

from __future__ import annotations

import torch
from attrs import evolve, frozen
from torch import Tensor

from wmtp.data.batch import Batch
from wmtp.distributed.ranks import Ranks

__all__ = ["Share"]


@frozen(kw_only=True, eq=False)
class Share:
    """One rank's rows: as many on every rank, one rank's after another's.

    Every rank must do the same forward and backward passes, or one would wait for another for ever. Where the rows do not
    suffice, a rank computes the first row once more, with nothing to learn in it.

    Args:
        ranks: all of them.
        rows: B, of the whole step.
    """

    ranks: Ranks
    rows: int

    @property
    def count(self) -> int:
        """Rows that each rank computes."""
        return -(-self.rows // self.ranks.world)

    def batch(self, whole: Batch) -> Batch:
        """This rank's rows of a batch."""
        if self.ranks.world == 1:
            return whole
        index, real = self._index()
        return evolve(
            whole,
            input_ids=whole.input_ids[index],
            document=whole.document[index],
            position=whole.position[index],
            learn=whole.learn[index] & real.unsqueeze(1),
            weight=None if whole.weight is None else whole.weight[index],
        )

    def take(self, whole: Tensor) -> Tensor:
        """This rank's rows of ``[B, …]``; 0 in rows that fill up."""
        if self.ranks.world == 1:
            return whole
        first = min(self.ranks.rank * self.count, self.rows)
        own = whole[first : first + self.count]
        missing = self.count - len(own)
        return own if not missing else torch.cat([own, own.new_zeros((missing, *own.shape[1:]))])

    def gather(self, own: Tensor) -> Tensor:
        """``[B, …]`` from every rank's rows, in the order of the data."""
        return self.ranks.gather(own)[: self.rows]

    def _index(self) -> tuple[Tensor, Tensor]:
        index = torch.arange(self.count) + self.ranks.rank * self.count
        real = index < self.rows
        return torch.where(real, index, 0), real

"""Processes of a run, and the messages between them.

One process (a *rank*) computes on one device. Everything that decides how a run continues (signals, early stopping, errors
before the first step) is agreed by all ranks, so that none waits for one that has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from attrs import evolve, frozen
from torch import Tensor, nn

from wmtp.data.batch import Batch
from wmtp.distributed.failures import Failure, heard
from wmtp.errors import WMTPError
from wmtp.plugins.failures import plugin_failure

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SINGLE_PROCESS", "Ranks", "Share", "Watch"]

T = TypeVar("T")

#: numbers in one bucket of gradients that are added up together
_BUCKET = 2**25


class Watch(Protocol):
    """Watcher of this rank's progress; see `wmtp.distributed.monitor`."""

    @property
    def running(self) -> bool:
        """True while the timeout is counting."""
        ...

    def tick(self, done: str) -> None:
        """Record progress, and restart the timeout."""

    def pause(self) -> None:
        """Stop the timeout: the next operation may take any time."""


@frozen(kw_only=True, eq=False)
class Ranks:
    """Processes of this run, seen from one of them.

    Default: one process without communication.

    Args:
        rank: this process, from 0; rank 0 writes files and logs.
        world_size: how many there are.
        local_rank: this process among those of its machine, from 0.
        per_machine: processes of each machine, which have consecutive ranks; None where machines differ.
        control: a group for small messages between the CPUs.
        patient: the same, for messages where another rank may rightly take long: reading data, loading a model.
        watch: is told of this rank's progress.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    per_machine: int | None = 1
    control: ProcessGroup | None = None
    patient: ProcessGroup | None = None
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def tick(self, done: str) -> None:
        """Record progress: this rank is alive.

        See `wmtp.distributed.monitor`.
        """
        if self.watch is not None:
            self.watch.tick(done)

    def tick_within_step(self, done: str) -> None:
        """Record progress within a step: `tick` while the timeout is counting."""
        if self.watch is not None and self.watch.running:
            self.watch.tick(done)

    def pause(self) -> None:
        """Stop the timeout: the next operation may take any time."""
        if self.watch is not None:
            self.watch.pause()

    # --- numbers

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate all ranks' ``values``, of equal shape, along dimension 0."""
        if self.world_size == 1:
            return values
        sent = values.contiguous()
        sent = sent.view(torch.uint8) if sent.dtype == torch.bool else sent
        found = sent.new_empty((self.world_size * len(sent), *sent.shape[1:]))
        dist.all_gather_into_tensor(found, sent)
        return found.view(torch.bool) if values.dtype == torch.bool else found

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of parameters that every rank holds in full.

        A parameter that no rank has a gradient for keeps none; one that only some have a gradient for counts as 0 elsewhere.
        """
        if self.world_size == 1:
            return
        learns = [parameter for parameter in parameters if parameter.requires_grad]
        has = torch.tensor([parameter.grad is not None for parameter in learns], dtype=torch.uint8)
        dist.all_reduce(has, dist.ReduceOp.MAX, group=self.control)
        gradients = []
        for parameter, somewhere in zip(learns, has.tolist(), strict=True):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        under_way = []
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in under_way:
            work.wait()
            for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def any(self, flag: bool) -> bool:
        """Return True if ``flag`` is true on some rank."""
        return bool(self.max(float(flag)))

    def max(self, value: float) -> float:
        """Return the largest ``value`` of all ranks."""
        if self.world_size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return float(number)

    @property
    def _messages(self) -> ProcessGroup | None:
        """Group for messages of Python objects.

        During training answers must come in time; before and after, reading and writing may take longer.
        """
        return self.control if self.watch is not None and self.watch.running else self.patient

    # --- objects, and errors that all ranks must know

    def objects(self, value: T) -> list[T]:
        """Return the ``value`` of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._messages)
        return found

    def main_only(self, work: Callable[[], T]) -> T:
        """Do ``work`` on rank 0 only.

        Every rank gets what it returned, or the error that it raised.
        """
        if self.world_size == 1:
            return work()
        value, error = self._attempt(work) if self.is_main else (None, None)
        sent: list[Any] = [value, error and Failure.of(error, self.rank)]
        dist.broadcast_object_list(sent, src=0, group=self._messages)
        if error is not None:
            raise error
        if sent[1] is not None:
            raise heard(sent[1].error(named=False))
        return sent[0] if not self.is_main else value  # type: ignore[return-value]

    def collective(self, work: Callable[[], T]) -> T:
        """Do ``work`` on every rank; if one fails, all fail.

        The error names the rank.
        """
        value, error = self._attempt(work)
        self._raise_if_any(error)
        return value  # type: ignore[return-value]

    def one_by_machine_first(self, work: Callable[[], T]) -> T:
        """Do ``work`` as `collective`, first on one rank of each machine.

        That one fills the caches that the others then find filled.
        """
        value, error = self._attempt(work) if self.local_rank == 0 else (None, None)
        self._raise_if_any(error)
        if self.local_rank != 0:
            value, error = self._attempt(work)
        if self.world_size > 1:
            self._raise_if_any(error)
        return value  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def _attempt(self, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        try:
            return work(), None
        except Exception as error:
            if self.world_size == 1:
                raise
            return None, plugin_failure(error) or error

    def _raise_if_any(self, error: Exception | None) -> None:
        if self.world_size == 1:
            return
        failures = [found for found in self.objects(error and Failure.of(error, self.rank)) if found is not None]
        if not failures:
            return
        everywhere = len(failures) == self.world_size and len({failure.lines for failure in failures}) == 1
        if error is not None and (everywhere or (len(failures) == 1 and not isinstance(error, WMTPError))):
            raise error if self.is_main or not everywhere else heard(error)
        raised = failures[0].error(named=not everywhere)
        raise raised if self.is_main else heard(raised)


#: a run of one process
SINGLE_PROCESS = Ranks()


@frozen(kw_only=True, eq=False)
class Share:
    """Rows of an optimizer step that one rank computes.

    As many on every rank, one rank's after another's.

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
        return -(-self.rows // self.ranks.world_size)

    def batch(self, whole: Batch) -> Batch:
        """This rank's rows of a batch."""
        if self.ranks.world_size == 1:
            return whole
        index, real = self._index()
        return evolve(
            whole,
            input_ids=whole.input_ids[index],
            document=whole.document[index],
            position=whole.position[index],
            loss_mask=whole.loss_mask[index] & real.unsqueeze(1),
            weight=None if whole.weight is None else whole.weight[index],
            scale=None if whole.scale is None else whole.scale[index],
        )

    def take(self, whole: Tensor) -> Tensor:
        """This rank's rows of ``[B, …]``; 0 in rows that fill up."""
        if self.ranks.world_size == 1:
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


def _buckets(gradients: list[Tensor]) -> Iterable[list[Tensor]]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for alike in by_dtype.values():
        bucket: list[Tensor] = []
        for gradient in alike:
            bucket.append(gradient)
            if sum(one.numel() for one in bucket) >= _BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket

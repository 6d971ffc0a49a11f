"""Numbers on their way from the device to the CPU, which nothing waits for until they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Readback"]


class Readback:
    """Scalars on their way from the device.

    Reading a tensor waits for everything that was given to the device before, the next step's work too. So the copy is asked
    for at once, behind the work that makes the numbers and before any other, and `read` waits for that copy alone.

    Args:
        values: by name. What is no single number comes back as it is.
    """

    def __init__(self, values: Mapping[str, Tensor | float]) -> None:
        self._values = dict(values)
        self._copied: dict[str, int] = {}
        on_device = {n: v.detach() for n, v in values.items() if isinstance(v, Tensor) and v.is_cuda and v.numel() == 1}
        if not on_device:
            return
        together = torch.stack([value.reshape(()).to(torch.float64) for value in on_device.values()])
        self._host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True).copy_(together, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()
        self._copied = {name: place for place, name in enumerate(on_device)}

    def read(self) -> dict[str, Tensor | float]:
        """Return the values, those of the device as numbers."""
        if self._copied:
            self._arrived.synchronize()
            numbers = self._host.tolist()
            return self._values | {name: numbers[place] for name, place in self._copied.items()}
        return self._values

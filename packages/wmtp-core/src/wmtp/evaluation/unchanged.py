"""Notes what a model is before an evaluator, and says what the evaluator has changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch
from attrs import frozen
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["ModelState"]

#: bytes of an element → whole numbers of that size, whose sums depend on every bit, also of NaN
_WHOLE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@frozen(eq=False)
class ModelState:
    """Checksums of a model's parameters, and whether it was in eval mode.

    Args:
        checksums: of what this process holds of each parameter; on its device.
        training: names of modules in training mode.
    """

    checksums: dict[str, Tensor]
    training: frozenset[str]

    @classmethod
    @torch.no_grad()
    def of(cls, model: MTPModel) -> ModelState:
        """Note what a model is; reads every parameter twice."""
        checksums = {}
        for name, parameter in model.named_parameters():
            # what FSDP has gathered for a while has no DTensor then, and other names may have one later
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
            checksums[f"{name} {tuple(own.shape)}"] = _checksum(own)
        return cls(checksums, frozenset(name for name, module in model.named_modules() if module.training))

    def changes(self, now: ModelState) -> Iterator[str]:
        """Name what differs ``now``."""
        for name, before in self.checksums.items():
            if name in now.checksums and not torch.equal(before, now.checksums[name]):
                yield f"changed {name.partition(' ')[0]}"
        if now.training - self.training:
            yield "left the model in training mode"


def _checksum(tensor: Tensor) -> Tensor:
    """Sum a tensor's bits by rows and by columns, each with its number, so that an exchange of two is seen."""
    numbers = tensor.contiguous().view(_WHOLE[tensor.element_size()])
    numbers = numbers.flatten(1) if numbers.dim() > 1 else numbers.view(1, -1)
    sums = []
    for dim in (0, 1):
        part = numbers.sum(dim, dtype=numbers.dtype).long()  # wraps around; no copy in wider numbers is made
        sums.append((part * torch.arange(1, len(part) + 1, device=part.device)).sum())
    return torch.stack(sums)

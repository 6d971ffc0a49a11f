"""Comparison of a model before and after an evaluator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor
from torch.distributed.tensor import DTensor

from wmtp.models.checksum import checksum

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["ModelState"]


@frozen(eq=False)
class ModelState:
    """Checksums of a model's parameters, and its modules in training mode.

    Args:
        checksums: of what this process holds of each parameter; on its device.
        training: names of modules in training mode.
    """

    checksums: dict[str, Tensor]
    training: frozenset[str]

    @classmethod
    def of(cls, model: MTPModel) -> ModelState:
        """Note what a model is; reads every parameter twice."""
        checksums = {}
        for name, parameter in model.named_parameters():
            # what FSDP has gathered for a while has no DTensor then, and others may have one later
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            checksums[f"{name} {tuple(own.shape)}"] = checksum(own)
        return cls(checksums, frozenset(name for name, module in model.named_modules() if module.training))

    def changes(self, now: ModelState) -> Iterator[str]:
        """Name what differs ``now``."""
        for name, before in self.checksums.items():
            if (after := now.checksums.get(name)) is None:
                continue
            if after.device != before.device:
                yield f"moved {name.partition(' ')[0]} to the device {after.device}"
            elif not torch.equal(before, after):
                yield f"changed {name.partition(' ')[0]}"
        if now.training - self.training:
            yield "left the model in training mode"

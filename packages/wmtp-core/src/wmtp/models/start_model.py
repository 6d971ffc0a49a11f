"""Model as it was before its adapter learned."""

from __future__ import annotations

from attrs import evolve
from torch import Tensor, nn

from wmtp.models.adapters import adapter_off
from wmtp.models.fp8 import products_in_bf16
from wmtp.models.mtp import MTPModel, MTPOutput

__all__ = ["StartModel"]


class StartModel(MTPModel):
    """Head 1 of a model with its adapter off.

    It has the same weights, and no memory of its own.

    Args:
        model: has an adapter, and goes on learning.
    """

    def __init__(self, model: MTPModel) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(model).items() if not name.startswith("_")})
        self.base, self.extra_heads = model.base, nn.ModuleList()
        self.heads = evolve(model.heads, horizon=1)
        self._tokenizer = None

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, packed: bool = False, router_logits: bool = False
    ) -> MTPOutput:
        """Run the trunk and head 1; see `MTPModel.forward`."""
        with adapter_off(self.base), products_in_bf16(self.base):
            return super().forward(input_ids, position_ids, packed, router_logits)

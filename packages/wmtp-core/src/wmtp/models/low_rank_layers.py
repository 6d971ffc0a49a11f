"""peft's adapted linear maps, computed by one operator. Importing it imports peft."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from wmtp.loss.cross_entropy import precision
from wmtp.models.low_rank import adapted_linear
from wmtp.models.quantized import Linear4Bit

__all__ = ["AdaptedLinear", "use_one_operator"]


class AdaptedLinear(Linear):
    """PEFT's adapted linear map, computed by one operator.

    In its usual state `wmtp.models.low_rank` computes it, otherwise PEFT does.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``.

        The result has the precision of x or of autocast.
        """
        base = self.base_layer
        if args or kwargs or self.disable_adapters or self.merged or type(base) not in (nn.Linear, Linear4Bit):
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        dtype = precision(x)
        packed = isinstance(base, Linear4Bit)
        return adapted_linear(
            _as(x, dtype),
            [base.packed if packed else _as(base.weight, dtype)],  # type: ignore[arg-type]
            [base.scales] if packed else [],
            [] if base.bias is None else [_as(base.bias, dtype)],  # type: ignore[arg-type]
            _as(self.lora_A[name].weight, dtype),  # type: ignore[arg-type]
            [_as(self.lora_B[name].weight, dtype)],  # type: ignore[arg-type]
            self.scaling[name],
            False,
        )[0]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert, where that changes anything: a compiler sees the same tensor otherwise."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def use_one_operator(base: nn.Module) -> None:
    """Compute adapted linear maps by one operator each.

    They are those of a model or a part of one where PEFT's own would be as plain.

    Args:
        base: in place. DoRA, and what is no `nn.Linear`, stays as peft has it.
    """
    for module in base.modules():
        if type(module) is Linear and not module.lora_variant and not any(module.lora_bias.values()):
            module.__class__ = AdaptedLinear

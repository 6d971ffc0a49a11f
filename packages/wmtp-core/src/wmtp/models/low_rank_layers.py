"""peft's adapted linear maps, computed by one operator. Importing it imports peft."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from wmtp.models.fp8_frozen import FrozenFp8Linear
from wmtp.models.low_rank import adapted_linear, adapted_linear_4bit
from wmtp.models.low_rank_fp8 import adapted_linear_fp8
from wmtp.models.quantized import Linear4Bit
from wmtp.models.quantized_fp8 import adapted_linear_4bit_fp8

__all__ = ["AdaptedLinear", "use_one_operator"]


class AdaptedLinear(Linear):
    """peft's adapted linear map; in its usual state `wmtp.models.low_rank` computes it, otherwise peft does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the precision of x or of autocast."""
        base = self.base_layer
        known = isinstance(base, FrozenFp8Linear) or type(base) in (nn.Linear, Linear4Bit)
        if args or kwargs or self.disable_adapters or self.merged or not known:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        down: Tensor = self.lora_A[name].weight.to(dtype)  # type: ignore[assignment,operator]
        up: Tensor = self.lora_B[name].weight.to(dtype)  # type: ignore[assignment,operator]
        if type(base) is FrozenFp8Linear:
            return adapted_linear_fp8(x.to(dtype), base, down, up, self.scaling[name])
        if isinstance(base, Linear4Bit) and base.products is not None:
            return adapted_linear_4bit_fp8(x.to(dtype), base, base.products, down, up, self.scaling[name])
        bias: Tensor | None = base.bias  # type: ignore[assignment]
        bias = None if bias is None else bias.to(dtype)
        if isinstance(base, Linear4Bit):
            return adapted_linear_4bit(x.to(dtype), base.packed, base.scales, bias, down, up, self.scaling[name])[0]
        return adapted_linear(x.to(dtype), base.weight.to(dtype), bias, down, up, self.scaling[name])[0]  # type: ignore[operator]


def use_one_operator(base: nn.Module) -> None:
    """Have the adapted linear maps of a model or a part of one computed by one operator each, where peft's would be as plain.

    Args:
        base: in place. DoRA, and what is no `nn.Linear`, stays as peft has it.
    """
    for module in base.modules():
        if type(module) is Linear and not module.lora_variant and not any(module.lora_bias.values()):
            module.__class__ = AdaptedLinear

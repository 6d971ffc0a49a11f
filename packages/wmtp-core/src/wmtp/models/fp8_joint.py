"""One product in fp8 for linear maps of one input: queries, keys and values; gate and up. Importing it imports torchao."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

__all__ = ["join_maps"]

#: names that architectures give to maps of one input, in the order in which they are called
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _First(Float8Linear):
    """Computes the product of its group, and leaves the others their parts."""

    others: tuple[_Other, ...]

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        read = input.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else input
        group = (self, *self.others)
        weight = torch.cat([module.weight for module in group])
        product = matmul_with_hp_or_float8_args.apply(read, weight.t(), self.linear_mm_config, self.config)
        own, *rest = product.split([module.out_features for module in group], dim=-1)
        for module, part in zip(self.others, rest, strict=True):
            module.waiting = input, part
        return _with_bias(own, self.bias)


class _Other(Float8Linear):
    """Takes its part of the product before, where that was of the same input."""

    waiting: tuple[Tensor, Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        found, self.waiting = self.waiting, None
        if found is None or found[0] is not input:
            return super().forward(input)
        return _with_bias(found[1], self.bias)


def join_maps(layer: nn.Module) -> int:
    """Join the groups of a layer whose maps all multiply in fp8; return how many there are.

    Names, parameters and state dicts stay as they are.
    """
    groups = list(_groups(layer))
    for first, *others in groups:
        first.__class__ = _First
        first.others = tuple(others)  # type: ignore[assignment]
        for module in others:
            module.__class__ = _Other
            module.waiting = None  # type: ignore[assignment]
    return len(groups)


def _groups(layer: nn.Module) -> Iterator[list[Float8Linear]]:
    for parent in layer.modules():
        for names in _GROUPS:
            group = [getattr(parent, name, None) for name in names]
            found = [module for module in group if type(module) is Float8Linear]
            if len(found) == len(names) and len({module.in_features for module in found}) == 1:
                yield found


def _with_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.dtype)

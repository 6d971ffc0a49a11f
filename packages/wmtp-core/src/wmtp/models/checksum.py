"""Checksum of a tensor, to compare tensors bit by bit."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["checksum"]

#: bytes of an element → whole numbers of that size, whose sums depend on every bit, also of NaN
_WHOLE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Sum a tensor's bits by rows and columns, weighted by index.

    So an exchange of two rows or columns is seen, unless their sums are equal.

    Returns:
        ``[2]`` int64, on the tensor's device, which is not waited for.
    """
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    numbers = real.detach().contiguous().view(_WHOLE[real.element_size()])
    numbers = numbers.flatten(1) if numbers.dim() > 1 else numbers.view(1, -1)
    sums = []
    for dim in (0, 1):
        part = numbers.sum(dim, dtype=numbers.dtype).long()  # wraps around; no copy in wider numbers is made
        sums.append((part * torch.arange(1, len(part) + 1, device=part.device)).sum())
    return torch.stack(sums)

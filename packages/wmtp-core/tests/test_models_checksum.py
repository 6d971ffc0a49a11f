"""Checksums of tensors see every changed bit, in every type of number."""

from __future__ import annotations

import pytest
import torch

from wmtp.models.checksum import checksum

TYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_changed_number_and_exchanged_rows_are_seen(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).to(dtype)
    other = tensor.clone()
    other[0, 1] = 1
    rows = torch.stack([tensor[1], tensor[0]])
    sums = [tuple(checksum(one).tolist()) for one in (tensor, tensor.clone(), other, rows)]
    assert sums[0] == sums[1]
    assert len(set(sums)) == 3


def test_a_conjugate_is_another_tensor() -> None:
    number = torch.tensor(1.0 + 2.0j)
    assert checksum(number).tolist() != checksum(number.conj()).tolist()

"""The kernel for weights of 4 bits against bitsandbytes, in Triton's interpreter, which runs without a GPU."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("Triton or bitsandbytes is not installed", allow_module_level=True)

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_the_kernel_in_the_interpreter(assert_passes_interpreted):
        assert_passes_interpreted()

else:
    from torch import nn

    from wmtp.models import nf4_kernel, quantized

    @pytest.mark.parametrize("shape", [(96, 40), (3, 7), (130, 65)])
    def test_weights_are_those_of_bitsandbytes(shape):
        torch.manual_seed(0)
        made = quantized.Linear4Bit.of(nn.Linear(*shape[::-1], bias=False), torch.device("cpu"))
        table = quantized._table(torch.device("cpu"))
        assert table[[0, 7, 15]].tolist() == [-1, 0, 1]
        for dtype in (torch.float32, torch.bfloat16):
            guarded = torch.full((shape[0] + 1, shape[1]), 5.0, dtype=dtype)
            found = nf4_kernel.dequantize(made.packed, made.scales, table, guarded[:-1], block=64)
            expected = quantized.dequantize(made.packed, made.scales, *shape, dtype)
            # the interpreter cuts digits off where a GPU rounds
            torch.testing.assert_close(found, expected, rtol=0 if dtype == torch.float32 else 2.0**-7, atol=0)
            assert (guarded[-1] == 5).all()

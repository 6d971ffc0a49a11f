"""The kernel that transposes weights in fp8, in Triton's interpreter, which runs without a GPU."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_the_kernel_in_the_interpreter(assert_passes_interpreted):
        assert_passes_interpreted()

else:
    from wmtp.models import fp8_kernel

    @pytest.mark.parametrize("shape", [(128, 256), (48, 80), (130, 3)])
    def test_a_matrix_of_bytes_is_transposed(shape):
        matrix = torch.randint(0, 255, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        found = fp8_kernel.transpose(matrix)
        assert found.dtype == matrix.dtype
        assert torch.equal(found.view(torch.uint8), matrix.view(torch.uint8).T)

"""The kernels that round to fp8 and transpose, in Triton's interpreter, which runs without a GPU."""

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

    @pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize("shape", [(128, 256), (48, 80), (130, 3)])
    def test_a_matrix_is_rounded_by_rows_and_by_columns_alike(shape, kind):
        rows, columns = shape
        # numbers that the format holds: the interpreter rounds others its own way
        held = (3 * torch.randn(shape)).to(kind)
        matrix = torch.cat([held.to(torch.bfloat16) / 4, torch.full((rows, 1), torch.nan)], 1)[:, :columns]
        assert not matrix.is_contiguous()
        filled = -(-rows // 16) * 16
        across, down = fp8_kernel.round_matrix(matrix, torch.tensor(4.0), kind, filled, across=True)
        assert torch.equal(across.float(), held.float())
        assert torch.equal(down.float()[:, :rows], held.float().T)
        assert down.shape == (columns, filled)
        assert (down.float()[:, rows:] == 0).all()
        none, again = fp8_kernel.round_matrix(matrix, torch.tensor(4.0), kind, filled, across=False)
        assert none is None
        assert torch.equal(again.view(torch.uint8), down.view(torch.uint8))

    def test_what_is_too_large_for_the_format_becomes_its_largest_number():
        matrix = torch.tensor([[1e4, -1e4, 1.0]] * 16, dtype=torch.bfloat16)
        across, down = fp8_kernel.round_matrix(matrix, torch.tensor(1.0), torch.float8_e4m3fn, 16, across=True)
        assert across.float()[3].tolist() == down.float()[:, 3].tolist() == [448.0, -448.0, 1.0]

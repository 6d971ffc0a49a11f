"""Adapted maps whose weights are kept in 4 bits and multiplied in fp8. On a CPU products are emulated."""

import pytest
import torch
from adapted import IDS
from test_models_fp8 import devices, error
from test_models_quantized import quantized
from torch import nn

from wmtp.models.acceleration import accelerate
from wmtp.models.fp8 import multiply_in_fp8, products_in_bf16
from wmtp.models.fp8_frozen import Products
from wmtp.models.quantized import Linear4Bit, dequantize_to_fp8
from wmtp.models.quantized_fp8 import adapted_linear_4bit_fp8

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")


def linear():
    torch.manual_seed(0)
    return Linear4Bit.of(nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False), CPU)


def fits(module):
    return not module.in_features % 16 and not module.out_features % 16


def test_a_weight_comes_back_to_fp8_rounded_once():
    base = linear()
    stored, scale = dequantize_to_fp8(base.packed, base.scales, 48, 64)
    whole = base.weight.float()
    found = stored.view(torch.float8_e4m3fn).float() * scale
    assert found.abs().max() == pytest.approx(float(whole.abs().max()), rel=0.01)
    assert (found - whole).abs().max() <= 2.0**-4 * whole.abs().max()
    assert 0 < error(found, whole) < 0.04


@pytest.mark.parametrize("by_rows", [False, True])
def test_an_adapted_map_has_the_gradients_of_its_parts(by_rows):
    """For every choice of what learns; the weight is what 4 bits have left of it, in fp8."""
    base = linear()
    products = Products(by_rows=by_rows, fast_forward=True, fast_backward=True, emulate=True)
    stored, scale = dequantize_to_fp8(base.packed, base.scales, 48, 64)
    weight = stored.view(torch.float8_e4m3fn).float() * scale
    a, b, x = (torch.randn(shape).bfloat16() for shape in ((4, 64), (48, 4), (2, 5, 64)))
    seed = torch.randn(2, 5, 48).bfloat16()
    for learns in ((x,), (a,), (b,), (a, b), (x, a, b)):
        for tensor in (x, a, b):
            tensor.requires_grad_(any(tensor is one for one in learns))
        found = adapted_linear_4bit_fp8(x, base, products, a, b, 1.5)
        expected = x.float() @ weight.T + base.bias + 1.5 * x.float() @ a.float().T @ b.float().T  # type: ignore[operator]
        assert error(found.float(), expected) < 0.02
        for got, wanted in zip(*(torch.autograd.grad(y, learns, seed.to(y.dtype)) for y in (found, expected)), strict=True):
            assert error(got.float(), wanted.float()) < 0.03


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_model_in_4_bits_learns_in_fp8_and_is_measured_in_bf16(base, mode):
    model, plain = (quantized(base, dtype=torch.bfloat16) for _ in range(2))
    count = multiply_in_fp8(model, devices())
    in_4_bits = [module for module in model.base.modules() if isinstance(module, Linear4Bit)]
    found = [module for module in in_4_bits if fits(module)]
    assert len(in_4_bits) == 2 * 7
    assert count > len(found) > 0, "heads too"
    assert all((module.products is not None) == fits(module) for module in in_4_bits)
    accelerate(model, devices(mode))
    results = []
    for one in (model, plain):
        states = torch.stack(one(IDS).hidden)
        states.float().sum().backward()
        gradients = {name: p.grad.float() for name, p in one.named_parameters() if "lora_" in name and p.grad is not None}
        results.append((states.detach().float(), gradients))
    (hidden, own), (expected, wanted) = results
    assert own.keys() == wanted.keys()
    assert 0.002 < error(hidden, expected) < 0.15
    assert all(error(own[name], wanted[name]) < 0.5 for name in wanted)
    with torch.no_grad(), products_in_bf16(model):
        assert torch.equal(torch.stack(model(IDS).hidden).float(), torch.stack(plain(IDS).hidden).float())
    assert all(module.products is not None for module in found)
    model.merge_adapter()
    plain.merge_adapter()
    ours, theirs = model.base.state_dict(), plain.base.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_excluded_multiplies_in_bf16(base):
    model = quantized(base, dtype=torch.bfloat16)
    multiply_in_fp8(model, devices(exclude=("*.k_proj.base_layer",)))
    maps = {name: module for name, module in model.named_modules() if isinstance(module, Linear4Bit) and fits(module)}
    left = [name for name, module in maps.items() if module.products is None]
    assert left
    assert all("k_proj" in name for name in left)

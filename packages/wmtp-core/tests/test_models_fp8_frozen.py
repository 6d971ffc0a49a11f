"""Weights that never learn, kept in fp8: their products, and what they leave alone. On a CPU products are emulated."""

import pytest
import torch
from test_models_fp8 import devices, error, make, run
from torch import nn

from wmtp.config.schema import LoraConfig
from wmtp.errors import WMTPError
from wmtp.models.acceleration import accelerate
from wmtp.models.adapters import adapter_off
from wmtp.models.fp8 import multiply_in_fp8, products_in_bf16
from wmtp.models.fp8_frozen import FrozenFp8Linear, FrozenLinear, Products
from wmtp.models.start_model import StartModel

pytest.importorskip("torchao")
pytest.importorskip("peft")

CPU = torch.device("cpu")


def products(*, by_rows=False):
    return Products(by_rows=by_rows, fast_forward=True, fast_backward=True, emulate=True)


def adapted(*, dora=False):
    """A model whose adapter is away from its start, with what never learns frozen as a run freezes it."""
    model = make(lora=LoraConfig(rank=16, dora=dora))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype))
    for parameter in model.fixed_parameters():
        parameter.requires_grad_(False)
    return model


def kept(model):
    return {name for name, module in model.named_modules() if isinstance(module, FrozenFp8Linear)}


def test_products_are_bit_for_bit_those_of_casting_the_weight_each_time():
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    linear = nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    frozen = FrozenFp8Linear.of(linear, products(), CPU)
    cast = convert_to_float8_training(nn.Sequential(linear), config=Float8LinearConfig(emulate=True))
    x = (3 * torch.randn(2, 5, 64)).bfloat16().requires_grad_()
    results = []
    for module in (frozen, cast):
        y = module(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))
    assert error(results[0][0].float(), x.float() @ linear.weight.float().T + linear.bias.float()) > 0.01


def test_by_rows_each_row_has_its_scale_and_the_gradient_reads_the_same_weight():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-6, 3, 48)[:, None])  # one scale for all would lose the smallest rows
    frozen = FrozenFp8Linear.of(linear, products(by_rows=True), CPU)
    assert ((frozen.weight - linear.weight).norm(dim=1) / linear.weight.norm(dim=1)).max() < 0.04
    x = torch.randn(2, 5, 64).bfloat16().requires_grad_()
    y = frozen(x)
    expected = x.float() @ frozen.weight.float().T
    assert all(error(y.float()[..., row], expected[..., row]) < 0.06 for row in range(48))
    seed = torch.randn(y.shape).bfloat16()
    (gradient,) = torch.autograd.grad(y, x, seed)
    assert 0 < error(gradient.float(), seed.float() @ frozen.weight.float()) < 0.06


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise-gw-hp"])
def test_frozen_weights_take_a_byte_and_the_rest_stays_as_it_is(recipe):
    model, plain = adapted(), adapted()
    sizes = {name: module.weight.numel() for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    states = model.learned_state().keys()
    multiply_in_fp8(model, devices(recipe=recipe))
    names = kept(model)
    assert names == {name for name in sizes if name.startswith("base.") and name.endswith("base_layer")}
    for name in names:
        module = model.get_submodule(name)
        assert [tensor.dtype for tensor in module.buffers()] == [torch.uint8, torch.float32]
        assert module.stored.nbytes == sizes[name]
        assert not module.state_dict()
        assert not list(module.parameters())
    assert model.learned_state().keys() == states
    assert type(model.get_submodule("extra_heads.0.self_attn.q_proj")).__name__ in ("Fp8Linear", "Float8Linear")
    hidden, found = run(model)
    expected, gradients = run(plain)
    assert found.keys() == gradients.keys()
    assert 0.002 < error(hidden, expected) < 0.1
    assert all(error(found[name], gradients[name]) < 0.3 for name in gradients)


def test_what_is_excluded_or_shall_be_divided_keeps_its_weight(caplog):
    model = adapted()
    multiply_in_fp8(model, devices(exclude=("*.k_proj",), first_layers=1))
    assert kept(model)
    assert not [name for name in kept(model) if "k_proj" in name or ".layers.0." in name]
    divided = adapted()
    with caplog.at_level("INFO", "wmtp"):
        multiply_in_fp8(divided, devices(), sharded=True)
    assert "the base stays in bf16, of which each process holds its part" in caplog.text
    assert not kept(divided)
    assert type(divided.get_submodule("base.model.layers.0.self_attn.q_proj.base_layer")).__name__ == "Fp8Linear"


def test_heads_that_learn_by_adapters_keep_their_weights_which_are_saved():
    model = make(lora=LoraConfig(rank=4, heads="adapters"), init="copy")
    names = model.own_state().keys()
    multiply_in_fp8(model, devices())
    assert kept(model)
    assert not [name for name in kept(model) if not name.startswith("base.")]
    assert model.own_state().keys() == names


@pytest.mark.parametrize("dora", [False, True])
def test_outside_of_training_products_are_in_bf16_of_the_rounded_weight(dora):
    model, plain = adapted(dora=dora), adapted(dora=dora)
    multiply_in_fp8(model, devices())
    for name in kept(model):
        own = model.get_submodule(name)
        assert isinstance(own, FrozenFp8Linear)
        plain.get_parameter(f"{name}.weight").data = own.weight
    before, _ = run(model)
    with products_in_bf16(model):
        inside, gradients = run(model)
        assert {type(model.get_submodule(name)) for name in kept(model)} == {FrozenLinear}
    after, _ = run(model)
    expected, wanted = run(plain)
    assert torch.equal(before, after)
    assert error(inside, expected) < 0.01  # peft adds up in another order
    assert all(error(gradients[name], wanted[name]) < 0.05 for name in wanted if wanted[name].norm() > 0)
    assert error(before, expected) > 0.002
    ids = torch.arange(8)[None]
    with torch.no_grad(), adapter_off(plain):
        assert torch.equal(StartModel(model)(ids).hidden[0], plain(ids).hidden[0])


def test_selective_checkpointing_computes_the_same():
    model, plain = adapted(), adapted()
    for one, mode in ((model, "selective"), (plain, "none")):
        multiply_in_fp8(one, devices())
        accelerate(one, devices(mode))
    (hidden, found), (expected, wanted) = run(model), run(plain)
    assert torch.equal(hidden, expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_adapter_is_never_merged_into_rounded_weights():
    model = adapted()
    multiply_in_fp8(model, devices())
    with pytest.raises(WMTPError, match=r"q_proj\.base_layer is kept in fp8, .*; merge the adapter that the run has saved"):
        model.merge_adapter()
    assert model.adapter is not None
    assert kept(model)


@pytest.mark.slow
def test_a_compiled_map_gives_the_same_numbers_and_keeps_no_weight():
    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    for by_rows in (False, True):
        maps = nn.Sequential(*(FrozenFp8Linear.of(linear, products(by_rows=by_rows), CPU) for _ in range(2)))
        x, results = torch.randn(4, 256).bfloat16().requires_grad_(), []
        for call in (maps, torch.compile(maps, fullgraph=True)):
            sizes = {}

            def keep(tensor, sizes=sizes):
                sizes[tensor.data_ptr()] = tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = call(x)
            results.append((y, *torch.autograd.grad(y.sum(), x)))
            assert sum(sizes.values()) < 2.2 * 256 * 256, "the weights themselves, and little else"
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)

"""Adapters on a base in 4 bits."""

import pytest
import torch
from adapted import IDS, make, plain_twin
from attrs import evolve
from one_step import ByPrediction, gradients, make_batch, reference
from torch import nn

from wmtp.config.schema import LoraConfig
from wmtp.errors import ConfigError
from wmtp.models.adapters import adapter_off, quantize_base
from wmtp.models.build import build_model, merge_brought
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.opening import load_model
from wmtp.models.quantized import Linear4Bit, dequantize_layers
from wmtp.trainers import Stage
from wmtp.training.stages import apply_stage

pytest.importorskip("peft")


def quantized(base, *, dtype=torch.float32, **heads):
    pytest.importorskip("bitsandbytes")
    model = make(base, dtype=dtype, **heads)
    model.adapter = evolve(model.adapter, quantize="nf4")
    quantize_base(model)
    return model


def test_gradients_on_4_bits_are_those_of_what_the_4_bits_say(base):
    """Against plain autograd over the weights that are left, in float64; heads 2..H are copies of the whole weights."""
    model, lora = quantized(base, dtype=torch.float64, init="copy"), LoraConfig(rank=2)
    assert sum(isinstance(module, Linear4Bit) for module in model.modules()) == 2 * 7
    apply_stage(Stage(), model, {}, "mine")
    batch = make_batch(packed=False)
    _, found = gradients(model, ByPrediction(), batch, micro=2)
    left = {name: m.weight for name, m in model.base.named_modules() if isinstance(m, Linear4Bit)}
    dequantize_layers(model.base)
    assert all(torch.equal(model.base.get_submodule(name).weight, weight) for name, weight in left.items())
    apply_stage(Stage(), model, {}, "mine")
    _, expected = gradients(model, ByPrediction(), batch, micro=2)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)
    twin, adapter = plain_twin(base, model, lora)
    for name, weight in left.items():
        plain = twin.base.get_submodule(name.removesuffix(".base_layer"))
        whole = HfLoader().load(base, dtype=torch.float64, seed=0).model.get_submodule(name.removesuffix(".base_layer"))
        plain.weight = plain.weight + (weight - whole.weight).detach()
    twin.extra_heads.load_state_dict(model.extra_heads.state_dict())
    reference(twin, batch, lambda b, t, k, id: float(id % 4 + k), [1.0, 1.0, 1.0]).backward()
    for name, leaf in adapter.items():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_new_adapter_changes_nothing_of_what_the_4_bits_say(base, dora):
    model = quantized(base, lora=LoraConfig(rank=2, dora=dora), moved=False)
    with torch.no_grad():
        found = model(IDS).hidden[0]
        with adapter_off(model):
            torch.testing.assert_close(found, model(IDS).hidden[0], rtol=1e-5, atol=1e-6)


def test_a_base_in_4_bits_is_opened_and_merged_as_it_was_learned_on(base, tmp_path):
    model = quantized(base)
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    with torch.no_grad():
        assert all(torch.equal(left, right) for left, right in zip(again(IDS).hidden, model(IDS).hidden, strict=True))
        again.merge_adapter()
        again.save_pretrained(tmp_path / "merged")
        merged = load_model(tmp_path / "merged")
        torch.testing.assert_close(merged(IDS).hidden[0], model(IDS).hidden[0], rtol=1e-5, atol=1e-5)
    whole = build_model(HfLoader().load(tmp_path / "adapter", dtype=torch.float32, seed=0), None, 0)
    merge_brought(whole)
    assert torch.equal(whole.logits(whole(IDS), 1), merged.logits(merged(IDS), 1))
    loaded = HfLoader().load(tmp_path / "adapter", dtype=torch.float32, seed=0)
    with pytest.raises(ConfigError, match=r'models\.base\.quantize: no quantize, but .* was learned with "nf4"; write that'):
        build_model(loaded, None, 0, lora=LoraConfig(rank=2))


def test_4_bits_are_those_of_bitsandbytes_and_follow_autocast():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(96, 40)
    made = Linear4Bit.of(linear, torch.device("cpu"))
    theirs = bitsandbytes.functional.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
    assert torch.equal(made.weight, bitsandbytes.functional.dequantize_4bit(*theirs))
    x = torch.randn(2, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), nn.functional.linear(x, made.weight) + linear.bias.bfloat16())
    assert not made.state_dict().keys() - {"bias"}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_no_weight_of_4_bits_is_kept_in_full_between_the_passes(compiled):
    """A compiler that sees the weight made twice keeps it: 17 GiB of a 7B model."""
    pytest.importorskip("bitsandbytes")
    size = 256
    maps = [Linear4Bit.of(nn.Linear(size, size, bias=False), torch.device("cpu")) for _ in range(2)]
    run = nn.Sequential(maps[0], nn.SiLU(), maps[1]).forward
    x, kept = torch.randn(4, size, requires_grad=True), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (torch.compile(run) if compiled else run)(x).sum().backward()
    assert sum(kept.values()) < 1.2 * size * size
    plain = nn.functional.silu(x @ maps[0].weight.T) @ maps[1].weight.T
    torch.testing.assert_close(torch.autograd.grad(plain.sum(), x)[0], x.grad)

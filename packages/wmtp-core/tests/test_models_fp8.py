"""Products in fp8: which maps, their error, and what they leave alone. On a CPU they are rounded and multiplied in fp32."""

import sys

import pytest
import torch
from attrs import evolve
from one_step import SMALL, VOCAB
from torch import nn

from wmtp.config.fp8_rules import _head_maps
from wmtp.config.schema import DevicesConfig, Fp8Config, HeadsConfig, LoraConfig
from wmtp.devices import autocast_context, pick_precision
from wmtp.errors import ConfigError
from wmtp.loss.fp8 import Fp8Logits
from wmtp.models.acceleration import accelerate
from wmtp.models.build import build_model
from wmtp.models.fp8 import check_fp8, fp8_logits, multiply_in_fp8, products_in_bf16
from wmtp.models.fp8_linear import Fp8Linear
from wmtp.models.start_model import StartModel
from wmtp.optim.master_weights import MasterWeights

pytest.importorskip("torchao")

CPU = torch.device("cpu")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU with fp8 products")


def devices(checkpointing="none", compiled=False, **fp8):
    fp8 = Fp8Config(**{"emulate": True, "min_features": 16} | fp8)
    return DevicesConfig(precision="fp8", fp8=fp8, activation_checkpointing=checkpointing, compile=compiled)


def make(*, lora=None, device=CPU, **heads):
    loaded = evolve(SMALL, intermediate_size=48).build().load(None, dtype=torch.float32, seed=1)
    model = build_model(loaded, HeadsConfig(**{"horizon": 3, "init": "random"} | heads), 5, lora=lora).eval()
    return model.to(device, torch.bfloat16)


def in_fp8(model):
    return {name for name, module in model.named_modules() if type(module).__name__ in ("Fp8Linear", "Float8Linear")}


def run(model, tokens=21, device=CPU):
    """Logit-free forward and backward pass: hidden states and gradients, in fp32."""
    ids = torch.arange(2 * tokens, device=device).view(2, tokens) * 7 % VOCAB
    position = torch.arange(tokens, device=device).expand_as(ids)
    model.zero_grad()
    with autocast_context("bf16-params", device)():
        hidden = torch.stack(model(ids, position).hidden)
    (hidden.float() * torch.arange(hidden.shape[-1], device=device).sin()).sum().backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach().float(), gradients


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise-gw-hp"])
def test_hidden_states_and_gradients_are_near_those_in_bf16_and_not_the_same(recipe):
    expected, gradients = run(make())
    model = make()
    multiply_in_fp8(model, devices(recipe=recipe))
    hidden, found = run(model)
    assert found.keys() == gradients.keys()
    assert 0.002 < error(hidden, expected) < 0.1
    assert all(error(found[name], gradients[name]) < 0.25 for name in gradients)


@pytest.mark.parametrize("heads", [{}, {"kind": "chained"}, {"kind": "residual"}, {"kind": "shared"}, {"kind": "linear"}])
def test_maps_of_trunk_and_heads_keep_their_names_and_parameters_and_unembeddings_stay(heads):
    model = make(**heads)
    before = dict(model.named_parameters())
    count = multiply_in_fp8(model, devices())
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    found = in_fp8(model)
    assert len(found) == count
    assert "base.model.layers.0.self_attn.q_proj" in found
    assert any(name.startswith("extra_heads") for name in found) == (heads.get("kind") != "linear")
    inner = {name.split(".", 4)[-1] for name in found if name.startswith("base.")}
    expected = set(_head_maps(inner, HeadsConfig(**{"kind": "block", "horizon": 3} | heads)))
    of_heads = {name for name in found if name.startswith("extra_heads")}
    assert of_heads == expected if heads.get("kind") != "shared" else of_heads < expected  # one module for all heads
    unembeddings = {"base.lm_head"} | ({"extra_heads.0"} if heads.get("kind") == "linear" else set())
    assert not unembeddings & found


def test_what_is_excluded_stays_in_bf16():
    every = make()
    multiply_in_fp8(every, devices())
    layers = len(every.anatomy.layers)

    def left(**fp8):
        model = make()
        multiply_in_fp8(model, devices(**fp8))
        return in_fp8(every) - in_fp8(model)

    assert left(exclude=("*.k_proj", "extra_heads.*")) == {
        name for name in in_fp8(every) if name.endswith("k_proj") or name.startswith("extra_heads")
    }
    assert {name.split(".")[3] for name in left(first_layers=1)} == {"0"}
    assert {name.split(".")[3] for name in left(last_layers=1)} == {str(layers - 1)}


def test_maps_that_fp8_cannot_compute_or_that_gain_nothing_stay_in_bf16():
    model = make()
    model.anatomy.layers[0].odd = nn.Linear(24, 32)
    multiply_in_fp8(model, devices())
    assert in_fp8(model)
    assert not any(name.endswith("odd") for name in in_fp8(model))
    width = make().hidden_size
    with pytest.raises(ConfigError, match=rf"min_features: this model's hidden states have {width} numbers"):
        multiply_in_fp8(make(), devices(min_features=width + 1000))
    with pytest.raises(ConfigError, match=r"no linear map of this model is left for fp8 \(base\..*exclude less"):
        multiply_in_fp8(make(), devices(exclude=("*",)))
    with pytest.raises(ConfigError, match=r"devices.fp8.exclude: 'nothing' names no linear map.*there are base\."):
        multiply_in_fp8(make(), devices(exclude=("nothing",)))


def test_logits_in_fp8_are_asked_for_by_name():
    assert fp8_logits(devices()) is None
    assert fp8_logits(DevicesConfig()) is None
    assert fp8_logits(devices(logits="forward")) == Fp8Logits(emulate=True)
    slow = devices(logits="hidden-gradient", fast_accumulation="none", emulate=False)
    assert fp8_logits(slow) == Fp8Logits(gradient=True, fast=False)


def test_a_model_without_whole_pieces_is_refused():
    odd = evolve(SMALL, hidden_size=24, intermediate_size=48).build().load(None, dtype=torch.float32, seed=1)
    with pytest.raises(ConfigError, match=r"hidden states of a multiple of 16 numbers, and this model has 24"):
        multiply_in_fp8(build_model(odd, HeadsConfig(horizon=2), 5), devices())


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointed_activations_give_the_same_gradients(checkpointing):
    results = []
    for mode in ("none", checkpointing):
        model = make()
        multiply_in_fp8(model, devices(mode))
        accelerate(model, devices(mode))
        results.append(run(model))
    (hidden, gradients), (again, found) = results
    assert torch.equal(hidden, again)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_inside_products_in_bf16_a_model_computes_as_the_saved_one_and_afterwards_as_before():
    plain, _ = run(make())
    model = make()
    multiply_in_fp8(model, devices())
    names = in_fp8(model)
    before, _ = run(model)
    with products_in_bf16(model):
        assert not in_fp8(model)
        inside, _ = run(model)
    after, _ = run(model)
    assert torch.equal(inside, plain)
    assert not torch.equal(before, plain)
    assert torch.equal(after, before)
    assert in_fp8(model) == names


@pytest.mark.parametrize("kind", ["Fp8Linear", "FrozenFp8Linear"])
def test_the_trial_of_attention_multiplies_in_bf16(kind, monkeypatch):
    """Nine tokens are refused by a GPU's fp8 products, or rounded more coarsely than attention is compared."""
    pytest.importorskip("peft")
    model = make(lora=LoraConfig(rank=16) if kind == "FrozenFp8Linear" else None)
    multiply_in_fp8(model, devices(), device=CPU)
    ours = [module for module in model.modules() if type(module).__name__ == kind]
    assert ours, "nothing multiplies in fp8"

    def refuse(self, x):
        raise RuntimeError("rows of no multiple of 16")

    monkeypatch.setattr(type(ours[0]), "forward", refuse)
    assert model.use_block_attention(), "packed rows would take masks of [B, 1, S, S]"
    assert {type(module).__name__ for module in ours} == {kind}


@pytest.mark.slow
def test_compiled_layers_follow_when_products_change():
    model = make(horizon=2)
    multiply_in_fp8(model, devices())
    accelerate(model, devices(compiled=True))
    ids = torch.arange(42).view(2, 21) % VOCAB
    position = torch.arange(21).expand_as(ids)

    @torch.no_grad()
    def hidden():
        with autocast_context("bf16-params", CPU)():
            return torch.stack(model(ids, position).hidden).float()

    with products_in_bf16(model):
        first = hidden()
    second = hidden()
    with products_in_bf16(model):
        third = hidden()
    assert error(second, first) > 0.002
    assert torch.equal(first, third)
    assert torch.equal(hidden(), second)


def test_an_adapters_own_maps_stay_in_bf16_and_with_the_adapter_off_so_does_its_base():
    """Of a model that will be divided; otherwise its weights are kept in fp8, as another file tests."""
    pytest.importorskip("peft")
    plain = make(lora=LoraConfig(rank=16))
    model = make(lora=LoraConfig(rank=16))
    multiply_in_fp8(model, devices(), sharded=True)
    found = in_fp8(model)
    assert any(name.endswith("q_proj.base_layer") for name in found)
    assert not any("lora_" in name for name in found)
    _, expected = run(plain)
    _, gradients = run(model)
    assert gradients.keys() == expected.keys()
    assert all(error(gradients[name], expected[name]) < 0.3 for name in expected if expected[name].norm() > 0)
    ids = torch.arange(8)[None] % VOCAB
    with torch.no_grad():
        start = StartModel(model)(ids).hidden[0]
        assert torch.equal(start, StartModel(plain)(ids).hidden[0])


def test_fp32_copies_learn_what_is_too_small_for_bf16():
    model = make()
    multiply_in_fp8(model, devices())
    masters = MasterWeights(model)
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("q_proj.weight"))
    (master,) = masters.replace([parameter])
    _, gradients = run(model)
    assert master.dtype == torch.float32
    assert master.grad is not None
    assert name not in gradients, "the copy has taken it"
    with masters.in_place():
        assert dict(model.named_parameters())[name] is master


def test_products_add_up_fast_as_it_is_said():
    def fast(**fp8):
        model = make()
        multiply_in_fp8(model, devices(**fp8))
        module = model.anatomy.layers[0].self_attn.q_proj
        if isinstance(module, Fp8Linear):
            return [module.products.fast_forward, module.products.fast_backward, module.products.fast_backward]
        config = module.config
        return [getattr(config, f"gemm_config_{name}").use_fast_accum for name in ("output", "grad_input", "grad_weight")]

    assert fast() == [True, True, True]
    assert fast(fast_accumulation="forward") == fast(recipe="rowwise") == [True, False, False]
    assert fast(fast_accumulation="none") == [False, False, False]


def test_the_device_is_asked_before_anything_is_read():
    assert pick_precision("fp8", CPU) == "bf16-params"
    with pytest.raises(ConfigError, match=r"devices.precision: fp8 needs an NVIDIA GPU, and the run computes on cpu; write"):
        check_fp8(devices(emulate=False), CPU)
    check_fp8(devices(), CPU)
    check_fp8(DevicesConfig(), CPU)


def test_a_torchao_that_cannot_be_imported_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    check_fp8(devices(), CPU)  # one scale a tensor needs no torchao
    with pytest.raises(
        ConfigError, match=r"\"rowwise\" needs torchao, which cannot be imported here \(.*pip install 'wmtp-core\[fp8\]'"
    ):
        check_fp8(devices(recipe="rowwise"), CPU)


def test_a_gpu_before_hopper_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"fp8 needs Hopper or newer, and NVIDIA A100 has capability 8\.0; write"):
        check_fp8(devices(emulate=False), torch.device("cuda"))


@on_hopper
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("recipe", "fast"),
    [
        ("tensorwise", "forward"),
        ("tensorwise", "all"),
        ("rowwise", "forward"),  # with all it is refused
        ("rowwise-gw-hp", "forward"),
        ("rowwise-gw-hp", "all"),
    ],
)
def test_a_gpus_products_are_those_that_are_emulated(recipe, fast, compiled):
    device = torch.device("cuda")
    results = []
    for emulate in (True, False):
        model = make(device=device)
        settings = devices(recipe=recipe, fast_accumulation=fast, emulate=emulate, compiled=compiled and not emulate)
        multiply_in_fp8(model, settings)
        accelerate(model, settings)
        results.append(run(model, device=device))  # 42 tokens, which 16 does not divide
    (expected, gradients), (hidden, found) = results
    assert error(hidden, expected) < 0.03
    assert all(error(found[name], gradients[name]) < 0.1 for name in gradients)


@on_hopper
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_a_gpu_computes_checkpointed_compiled_layers_again_alike(checkpointing):
    device = torch.device("cuda")
    results = []
    for mode in ("none", checkpointing):
        model = make(device=device)
        settings = devices(mode, emulate=False, compiled=True)
        multiply_in_fp8(model, settings)
        accelerate(model, settings)
        results.append(run(model, device=device))
    (hidden, gradients), (again, found) = results
    assert error(again, hidden) < 0.03
    assert all(error(found[name], gradients[name]) < 0.1 for name in gradients)

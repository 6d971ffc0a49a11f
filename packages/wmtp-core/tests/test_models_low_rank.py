"""Adapted linear maps as one operator."""

import logging
import warnings

import pytest
import torch
from adapted import IDS, make
from attrs import evolve
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

from wmtp.config.schema import DevicesConfig, LoraConfig
from wmtp.models import acceleration
from wmtp.models.acceleration import accelerate
from wmtp.models.adapters import quantize_base
from wmtp.models.quantized import Linear4Bit

peft = pytest.importorskip("peft")
from wmtp.models.low_rank import MAP, _pieces, joined_linear  # noqa: E402
from wmtp.models.low_rank_graph import join_weights  # noqa: E402
from wmtp.models.low_rank_layers import AdaptedLinear  # noqa: E402


def test_a_warning_about_what_is_intended_is_silenced(base, caplog):
    accelerate(make(base), DevicesConfig(activation_checkpointing="selective"))
    log = logging.getLogger("torch._higher_order_ops.wrap")
    log.warning("\nDetected that context_fn is passed to torch.utils.checkpoint under torch.compile.")
    log.warning("other")
    assert [record.message for record in caplog.records if record.name == log.name] == ["other"]


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_an_adapted_map_is_one_operator_with_the_gradients_of_its_parts(kind):
    """With a bias, in float64, for every choice of what learns."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).double().requires_grad_(False)
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        linear = Linear4Bit.of(linear, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that peft does not know
        made = AdaptedLinear(linear, "default", peft.LoraConfig(r=4, lora_alpha=6), r=4, lora_alpha=6)
    made = made.double()
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    nn.init.normal_(made.lora_B["default"].weight)
    a, b = made.lora_A["default"].weight, made.lora_B["default"].weight
    for learns in ((x,), (a,), (b,), (a, b), (x, a, b)):
        for tensor in (x, a, b):
            tensor.requires_grad_(any(tensor is one for one in learns))
        plain = nn.functional.linear(x, linear.weight, linear.bias) + 1.5 * (x @ a.T @ b.T)
        found = made(x)
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
        seed = torch.randn_like(plain)
        for got, wanted in zip(*(torch.autograd.grad(y, learns, seed) for y in (found, plain)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["apart", "beside", "biased", "nf4"])
def test_joined_maps_give_the_results_and_gradients_of_each(kind):
    """In float64, for every choice of what learns; a weight that lies beside the one before it is multiplied with it."""
    draw = torch.Generator().manual_seed(0)
    sizes, ranks = (32, 16, 48), (4, 4, 2)
    x, down = (torch.randn(*shape, 64, generator=draw, dtype=torch.float64) for shape in ((2, 3), (sum(ranks),)))
    whole = torch.randn(sum(sizes), 64, generator=draw, dtype=torch.float64)
    weights, scales = list(whole.split(sizes)), []
    if kind == "apart":
        weights = [weight.clone() for weight in weights]
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        linears = [nn.Linear(64, size).double() for size in sizes]
        packed = [Linear4Bit.of(linear, torch.device("cpu")) for linear in linears]
        weights, scales = [one.packed for one in packed], [one.scales for one in packed]
    biases = [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes] if kind == "biased" else []
    given = zip(sizes, ranks, strict=True)
    ups = [torch.randn(size, rank, generator=draw, dtype=torch.float64) for size, rank in given]
    for learns in ([x], [down], [ups[1]], [x, down, *ups]):
        for tensor in (x, down, *ups):
            tensor.requires_grad_(any(tensor is one for one in learns))
        *apart, _ = MAP(x, weights, scales, biases, down, ups, 1.5, False)
        joined = joined_linear(x, weights, scales, biases, down, ups, 1.5)
        torch.testing.assert_close(list(joined), apart, rtol=1e-12, atol=1e-12)
        seeds = [torch.randn(one.shape, generator=draw, dtype=torch.float64) for one in apart]
        kept = [index for index, one in enumerate(apart) if one.requires_grad]
        found = [
            torch.autograd.grad([some[i] for i in kept], learns, [seeds[i] for i in kept], allow_unused=True)
            for some in (joined, apart)
        ]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_weights_that_are_multiplied_together_come_to_lie_together(base):
    model, devices = make(base), DevicesConfig(compile=True, activation_checkpointing="selective")
    before = {name: p.clone() for name, p in model.named_parameters()}
    join_weights(model, evolve(devices, activation_checkpointing="none"))
    attention = model.anatomy.layers[0].self_attn
    weights = [getattr(attention, name).base_layer.weight for name in ("q_proj", "k_proj", "v_proj")]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 3
    join_weights(model, devices)
    pieces = list(
        _pieces(weights, [], [torch.empty(len(one), 1) for one in weights], torch.empty(3, weights[0].shape[1]), torch.float32)
    )
    assert len(pieces) == 1
    assert torch.equal(pieces[0][1], torch.cat(weights))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.is_contiguous()


@pytest.mark.parametrize("kind", ["lora", "dora", "nf4"])
def test_selective_checkpointing_keeps_one_result_of_an_adapted_map(base, kind, monkeypatch):
    """Both products and their sum would be more than without checkpointing."""
    kept, rule = [], acceleration._policy

    def policy(context, operator, *args, **kwargs):
        choice = rule(context, operator, *args, **kwargs)
        if choice == CheckpointPolicy.MUST_SAVE and "attention" not in str(operator):
            kept.append((str(operator), args))
        return choice

    monkeypatch.setattr(acceleration, "_policy", policy)
    model = make(base, lora=LoraConfig(rank=1, dora=kind == "dora"))
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        model.adapter = evolve(model.adapter, quantize="nf4")
        quantize_base(model)
    accelerate(model, DevicesConfig(activation_checkpointing="selective"))
    model(IDS)
    if kind == "dora":  # two products, of which the one by B is as large as their sum
        assert kept
        assert not [args for name, args in kept if "mm" in name and args[0].shape[1] == 1]
    else:
        assert len(kept) == 7 * (2 + 2)  # maps of two layers, and of two heads
        assert sum("adapted_linear" in name for name, _ in kept) == 7 * 2

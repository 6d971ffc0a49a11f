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

"""bf16 parameters with fp32 copies: what the optimizer sees, what is saved, and that small updates are not lost."""

import gc
import weakref

import pytest
import torch
from torch import nn

from wmtp.config.schema import HeadsConfig
from wmtp.models.build import build_model
from wmtp.models.config import ScratchModel
from wmtp.optim.config import AdamW, Muon
from wmtp.optim.master_weights import MasterWeights

SMALL = ScratchModel(
    vocab_size=23, hidden_size=16, layers=2, attention_heads=2, max_positions=64, intermediate_size=24, tie_embeddings=True
)


def make():
    return build_model(SMALL.build().load(None, dtype=torch.float32, seed=1), HeadsConfig(horizon=3), 5).eval()


def optimizer_of(model, masters, config):
    names, parameters = zip(*model.named_parameters(), strict=True)
    optimizer = config.build(list(zip(names, masters.replace(parameters), strict=True)))
    return masters.take_over(optimizer)


def test_an_update_too_small_for_bf16_is_kept_and_shows_in_time():
    layer = nn.Linear(4, 4, bias=False)
    nn.init.ones_(layer.weight)
    masters = MasterWeights(layer)
    (master,) = masters.replace(list(layer.parameters()))
    optimizer = torch.optim.SGD([master], lr=1e-3)
    optimizer = masters.take_over(optimizer)
    for step in range(1, 9):
        layer.weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(master, torch.full((4, 4), 1 - step * 1e-3))
        assert torch.equal(layer.weight, master.bfloat16())
    assert (layer.weight < 1).all(), "8e-3 is more than half of bf16's 2^-8 below 1"


def test_gradients_of_micro_batches_are_added_in_fp32_and_bf16_ones_are_freed():
    layer = nn.Linear(2, 2, bias=False)
    masters = MasterWeights(layer)
    (master,) = masters.replace(list(layer.parameters()))
    for factor in (1.0, *[2.0**-9] * 8):  # each of the small ones alone is lost beside 1 in bf16
        (layer.weight * factor).sum().backward()
        assert layer.weight.grad is None
    torch.testing.assert_close(master.grad, torch.full((2, 2), 1 + 8 * 2.0**-9))
    assert master.grad.dtype == torch.float32


@pytest.mark.parametrize("config", [AdamW(lr=1e-3), Muon(lr=1e-3)], ids=lambda c: c.type)
def test_the_optimizer_does_what_it_does_with_fp32_parameters_and_the_same_gradients(config):
    model, plain = make(), make()
    masters = MasterWeights(model)
    optimizer = optimizer_of(model, masters, config)
    reference = config.build(list(plain.named_parameters()))
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for own, other in zip(masters.replace(list(model.parameters())), plain.parameters(), strict=True):
            other.grad = torch.randn(own.shape, generator=draw)
            own.grad = other.grad.clone()
        optimizer.step()
        reference.step()
    for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other.bfloat16()), name


def test_the_copies_are_what_is_saved_and_what_is_read_into():
    model, other = make(), make()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    masters = MasterWeights(model)
    with masters.in_place():
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert model.base.lm_head.weight is model.base.model.embed_tokens.weight, "tied parameters stay tied"
    for name, tensor in before.items():
        assert torch.equal(saved[name], tensor), name
    with masters.in_place(), torch.no_grad():
        model.load_state_dict({name: tensor + 0.001 for name, tensor in saved.items()})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, (before[name] + 0.001).bfloat16()), name
    assert model.base.lm_head.weight is model.base.model.embed_tokens.weight


def test_frozen_parameters_give_the_copies_no_gradient():
    model = make()
    masters = MasterWeights(model)
    model.base.requires_grad_(False)
    sum(h.float().sum() for h in model(torch.arange(6).unsqueeze(0)).hidden).backward()
    parameters = list(model.named_parameters())
    copies = masters.replace([parameter for _, parameter in parameters])
    learned = {name for (name, _), copy in zip(parameters, copies, strict=True) if copy.grad is not None}
    assert learned
    assert all(name.startswith("extra_heads") for name in learned)


def test_a_model_and_its_copies_are_freed():
    model = nn.Linear(2, 2)
    masters = MasterWeights(model)
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    alive = [weakref.ref(model.weight), weakref.ref(masters)]
    del model, masters
    gc.collect()
    assert [reference() for reference in alive] == [None, None]

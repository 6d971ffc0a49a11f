"""New models: the same numbers from one seed, however many threads draw, and nothing drawn that is overwritten."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.models import drawing
from wmtp.models.drawing import seeded


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch):
    monkeypatch.setattr(drawing, "_LARGE", 64)


def make(seed: int = 3) -> dict[str, torch.Tensor]:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=7
    )
    with seeded(seed):
        return LlamaForCausalLM(config).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_numbers_depend_on_the_seed_alone(monkeypatch):
    first = make()
    monkeypatch.setattr(drawing, "usable_cores", lambda: 1)
    torch.rand(5)
    assert same(first, make())
    assert not same(first, make(4))


def test_the_distribution_is_that_of_the_initializer():
    state = make()
    for name, tensor in state.items():
        if "norm" in name:
            assert tensor.eq(1).all()
        else:
            assert 0.015 < tensor.std() < 0.025, name
            assert tensor.mean().abs() < 0.005, name
    assert state["model.embed_tokens.weight"][7].eq(0).all()  # after the draw, not before
    assert len({float(tensor.flatten()[3]) for name, tensor in state.items() if "norm" not in name}) == len(
        [name for name in state if "norm" not in name]
    )


def test_the_random_state_outside_stays():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    make()
    assert torch.equal(torch.rand(3), expected)


def test_a_draw_that_is_overwritten_is_not_made(monkeypatch):
    made = []
    plain = drawing._without_gradient
    monkeypatch.setattr(drawing, "_without_gradient", lambda draw: (made.append(draw), plain(draw)))
    with seeded(0):
        layer = nn.Linear(32, 32, bias=False)  # draws
        nn.init.normal_(layer.weight, std=0.5)
        with torch.no_grad():
            layer.weight.data.normal_(std=2.0)
        assert not made
    assert len(made) == 1
    assert 1.8 < layer.weight.std() < 2.2


@pytest.mark.parametrize(
    "use",
    [
        lambda tensor: tensor.mul_(2),
        lambda tensor: tensor.sum(),
        lambda tensor: tensor[0].zero_(),
        lambda tensor: tensor.clone(),
        lambda tensor: torch.stack([tensor, tensor]),
        lambda tensor: torch.zeros_like(tensor).copy_(tensor),
        lambda tensor: tensor.view(-1)[:3].tolist(),
        lambda tensor: tensor.data.add_(1),
    ],
)
def test_what_uses_a_waiting_tensor_sees_its_numbers(use):
    with seeded(0):
        tensor = torch.full((16, 16), torch.nan)
        tensor.normal_()
        found = use(tensor)
        numbers = tensor.clone()
        assert numbers.isfinite().all()
        if isinstance(found, torch.Tensor):
            assert found.isfinite().all()
    assert torch.equal(tensor, numbers)


def test_parts_and_generators_of_the_callers_own_are_drawn_at_once():
    with seeded(0):
        tensor = torch.full((16, 16), torch.nan)
        tensor[:8].normal_()
        tensor[8:].normal_(generator=torch.Generator().manual_seed(1))
        assert tensor.isfinite().all()


def test_draws_run_in_threads(monkeypatch):
    monkeypatch.setattr(drawing, "usable_cores", lambda: 2)
    names, both = set(), threading.Barrier(2, timeout=300)
    plain = drawing._without_gradient

    def draw(make):
        names.add(threading.current_thread().name)
        both.wait()
        plain(make)

    monkeypatch.setattr(drawing, "_without_gradient", draw)
    with seeded(0):
        a, b = torch.empty(100).normal_(), torch.empty(100).uniform_()
    assert len(names) == 2
    assert not torch.equal(a, b)

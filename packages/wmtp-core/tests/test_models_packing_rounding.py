"""A document that sees the one before it, told from products that round otherwise because experts get other rows."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.models import packing
from wmtp.models.anatomy import Anatomy, dissect
from wmtp.models.packing import Packing, find_packing


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, pad_token_id=None
    )
    return dissect(LlamaForCausalLM(config).eval())


@pytest.mark.parametrize(
    ("layers", "width", "difference", "separate"),
    [
        (4, 64, 5e-7, True),
        (4, 64, 3e-6, False),
        (48, 2048, 4e-6, True),  # Qwen3-Next-80B's size; a sixteenth of it differs by 7e-7
        (48, 2048, 1e-4, False),
    ],
)
def test_how_much_may_be_rounding_grows_with_the_model(layers, width, difference, separate, anatomy, monkeypatch):
    states = torch.ones(1, 5, 8)
    found = iter([states * (1 + difference), states, states] * 2)
    monkeypatch.setattr(packing, "_run", lambda *_: next(found))
    monkeypatch.setattr(packing, "_leaking_parts", lambda *_: ())
    monkeypatch.setattr(Anatomy, "hidden_size", width)
    monkeypatch.setattr(type(anatomy.layers), "__len__", lambda _: layers)
    result: Packing = find_packing(anatomy)
    assert (result.problem is None) is separate, result.problem

"""Products of few rows on a CPU: the same numbers, the same texts, and a model that is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.generation import generate, products
from wmtp.models.mtp import MTPModel

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))


def _neox() -> PreTrainedModel:  # one layer for queries, keys and values, with a bias
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))


def _model(base: PreTrainedModel, kind: Literal["block", "chained", "linear"] = "block") -> MTPModel:
    return MTPModel(base.eval(), HeadsConfig(horizon=4, kind=kind, warmup_steps=0), seed=1).eval()


def _use(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    """Let tiny weights count, whatever this machine is."""
    monkeypatch.setattr(products, "_FEWEST", 1)
    monkeypatch.setattr(products, "_pays", lambda model: pays)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 64), (1, 4, 64), (2, 3, 64), (60, 64), (0, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_what_torch_multiplies(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    given, weight, added = torch.randn(shape), torch.randn(50, 64), torch.randn(50) if bias else None
    found = products.multiply(given, weight, added)
    assert found.is_contiguous()
    torch.testing.assert_close(found, F.linear(given, weight, added), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [_llama, _neox])
@pytest.mark.parametrize("kind", ["block", "chained", "linear"])
def test_texts_are_the_same(
    make: Callable[[], PreTrainedModel],
    kind: Literal["block", "chained", "linear"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, multiplied = _model(make(), kind), 0

    def counted(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal multiplied
        multiplied += 1
        return plain(given, weight, bias)

    plain = products.multiply
    monkeypatch.setattr(products, "multiply", counted)
    requests = [([[5, 6, 7]], False), ([[5, 6, 7]], True), ([[5, 6, 7], [9, 8]], False), ([[5, 6, 7], [9, 8]], True)]
    texts = {}
    for used in (False, True):
        _use(monkeypatch, used)
        texts[used] = [
            [row.tokens for row in generate(model, prompts, max_new_tokens=24, eos_id=None, speculative=speculative)]
            for prompts, speculative in requests
        ]
        assert bool(multiplied) == used
    assert texts[True] == texts[False]
    assert texts[True][0] == texts[True][1]


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, True)
    model = _model(_llama())
    with products.fast_products(model):
        assert any("forward" in vars(module) for module in model.modules())
        with products.fast_products(model):  # another request at the same time
            pass
        assert any("forward" in vars(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_plain_fp32_weights_on_a_cpu_that_are_large_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_both_kernels", lambda: True)
    assert not products._pays(_model(_llama()))
    monkeypatch.setattr(products, "_FEWEST", 1)
    monkeypatch.setattr(products, "_FEWEST_IN_ALL", 1)
    model = _model(_llama())
    assert products._pays(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products._pays(model)
    assert not products._pays(_model(LlamaForCausalLM(LlamaConfig(**SMALL, dtype=torch.bfloat16)).bfloat16()))
    monkeypatch.setattr(products, "_has_both_kernels", lambda: False)
    assert not products._pays(model)

    class Packed(nn.Linear):
        """A layer whose weight is not what it multiplies by."""

    assert [type(layer) for layer in products._layers(nn.Sequential(Packed(8, 8), nn.Linear(8, 8)))] == [nn.Linear]

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


def _use(monkeypatch: pytest.MonkeyPatch, fewest: int | None) -> None:
    """Let tiny weights count, whatever a trial on this machine would say."""
    monkeypatch.setattr(products, "_FEWEST", 1)
    monkeypatch.setattr(products, "_fewest_rows", lambda model: fewest)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 64), (1, 4, 64), (2, 3, 64), (60, 64), (0, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_what_torch_multiplies(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    given, weight, added = torch.randn(shape), torch.randn(50, 64), torch.randn(50) if bias else None
    found = products.multiply(given, weight, added)
    assert found.is_contiguous()
    torch.testing.assert_close(found, F.linear(given, weight, added), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [_llama, _neox])
@pytest.mark.parametrize(("kind", "fewest"), [("block", 1), ("chained", 2), ("linear", 1)])
def test_texts_are_the_same(
    make: Callable[[], PreTrainedModel],
    kind: Literal["block", "chained", "linear"],
    fewest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, multiplied = _model(make(), kind), 0

    def counted(given: Tensor, weight: Tensor, bias: Tensor | None = None, *, fewest: int = 1) -> Tensor:
        nonlocal multiplied
        multiplied += 1
        return plain(given, weight, bias, fewest=fewest)

    plain = products.multiply
    monkeypatch.setattr(products, "multiply", counted)
    requests = [([[5, 6, 7]], False), ([[5, 6, 7]], True), ([[5, 6, 7], [9, 8]], False), ([[5, 6, 7], [9, 8]], True)]
    texts = {}
    for used in (None, fewest):
        _use(monkeypatch, used)
        texts[used] = [
            [row.tokens for row in generate(model, prompts, max_new_tokens=24, eos_id=None, speculative=speculative)]
            for prompts, speculative in requests
        ]
        assert bool(multiplied) == (used is not None)
    assert texts[fewest] == texts[None]
    assert texts[fewest][0] == texts[fewest][1]


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, 1)
    model = _model(_llama())
    with products.fast_products(model):
        assert any("forward" in vars(module) for module in model.modules())
        with products.fast_products(model):  # another request at the same time
            pass
        assert any("forward" in vars(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_plain_fp32_weights_on_a_cpu_that_are_large_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_gain", lambda weights, rows: 2.0)
    model = _model(_llama())
    assert products._fewest_rows(model) is None
    monkeypatch.setattr(products, "_FEWEST", 1)
    monkeypatch.setattr(products, "_FEWEST_IN_ALL", 1)
    model = _model(_llama())
    assert products._fewest_rows(model) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert products._fewest_rows(model) is None
    assert products._fewest_rows(_model(LlamaForCausalLM(LlamaConfig(**SMALL, dtype=torch.bfloat16)).bfloat16())) is None

    class Packed(nn.Linear):
        """A layer whose weight is not what it multiplies by."""

    assert [type(layer) for layer in products._layers(nn.Sequential(Packed(8, 8), nn.Linear(8, 8)))] == [nn.Linear]


@pytest.mark.parametrize(("gains", "fewest"), [({4: 2.0, 1: 2.0}, 1), ({4: 2.0, 1: 1.0}, 2), ({4: 1.0, 1: 2.0}, None)])
def test_the_usual_product_stays_where_the_other_is_not_faster(
    gains: dict[int, float], fewest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_FEWEST", 1)
    monkeypatch.setattr(products, "_FEWEST_IN_ALL", 1)
    taken = []
    timed = products._gain

    def given_gain(weights: list[Tensor], rows: int) -> float:
        taken.append(timed(weights, rows))
        return gains[rows]

    monkeypatch.setattr(products, "_gain", given_gain)
    assert products._fewest_rows(_model(_llama())) == fewest
    assert all(gain > 0 for gain in taken)

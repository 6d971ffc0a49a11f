"""Layers of a decoding step by our own kernels, in Triton's interpreter, which runs without a GPU; and where they fit."""

from __future__ import annotations

import importlib.util
import inspect
import os
from functools import partial
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_the_kernels_in_the_interpreter(assert_passes_interpreted):
        assert_passes_interpreted()

    @pytest.mark.slow
    def test_the_kernels_in_the_interpreter_in_every_case(assert_passes_interpreted):
        assert_passes_interpreted("slow")

else:
    from torch import Tensor, nn
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

    from wmtp.generation.cache import RowCache
    from wmtp.generation.choosing import choose_best, judge
    from wmtp.loss import Unembedding
    from wmtp.models import layer_steps
    from wmtp.models.anatomy import LayerCall
    from wmtp.models.attention_kernels import attend
    from wmtp.models.chains import ChainedBlock
    from wmtp.models.native.layouts import ChainRule
    from wmtp.models.prompt_steps import prompt_of
    from wmtp.models.step_cache import LayerPart

    class Part(LayerPart):
        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            rows = torch.arange(len(keys))[:, None]
            self.keys.transpose(1, 2)[rows, self.slots] = keys.transpose(1, 2)
            self.values.transpose(1, 2)[rows, self.slots] = values.transpose(1, 2)
            return self.keys, self.values

    def _layer(**changed: Any) -> LlamaDecoderLayer:
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
        config = LlamaConfig(**shape | changed)  # type: ignore[arg-type]
        config._attn_implementation = "eager"
        layer = LlamaDecoderLayer(config, 0).eval()
        for weight in layer.parameters():
            nn.init.normal_(weight, std=0.2)
        return layer

    def _call(rows: int, tokens: int) -> dict[str, Any]:
        slots = torch.tensor([130, 7])[:rows, None] + torch.arange(tokens)
        half = torch.randn(rows, tokens, 32)
        angles = torch.cat([half, half], -1)
        mask = torch.where(torch.arange(160) <= slots[..., None], 0.0, -torch.inf)[:, None]
        part = Part(torch.randn(rows, 1, 160, 64), torch.randn(rows, 1, 160, 64), slots)
        return {"attention_mask": mask, "position_embeddings": (angles.cos(), angles.sin()), CACHE: part}

    def _cache_name() -> str:
        names = inspect.signature(LlamaDecoderLayer.forward).parameters
        return next(name for name in ("cache", "past_key_values") if name in names)

    CACHE = _cache_name()

    @pytest.fixture(autouse=True)
    def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        monkeypatch.setattr(layer_steps, "_on_hopper", lambda _: True)

    def _run(layer: LlamaDecoderLayer, x: Tensor, **call: Any) -> Tensor:
        """The kernels take several texts too."""
        return layer_steps._layer(layer, x, call)

    def _refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the kernels fit")

    def _copied(call: dict[str, Any]) -> dict[str, Any]:
        part = call[CACHE]
        return call | {CACHE: Part(part.keys.clone(), part.values.clone(), part.slots)}

    @pytest.mark.parametrize(
        ("rows", "tokens", "between"),
        [
            (1, 1, 64),
            (1, 1, 192),
            (1, 4, 256),
            pytest.param(1, 5, 64, marks=pytest.mark.slow),
            pytest.param(1, 6, 256, marks=pytest.mark.slow),
            pytest.param(2, 3, 192, marks=pytest.mark.slow),
        ],
    )
    @torch.no_grad()
    def test_a_layer(rows: int, tokens: int, between: int) -> None:
        layer, x, call = _layer(intermediate_size=between), torch.randn(rows, tokens, 64), _call(rows, tokens)
        other = _copied(call)
        wanted = layer(x, **call)
        step = layer_steps.step_of(layer, _refuse) if rows == 1 else partial(_run, layer)
        found = step(x, **other)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other[CACHE].keys, call[CACHE].keys)
        torch.testing.assert_close(other[CACHE].values, call[CACHE].values)
        if rows == 1:
            alone = _copied(call)
            found = layer_steps._layer(layer, x, alone, last=True)
            torch.testing.assert_close(found, wanted[:, -1:], rtol=1e-5, atol=1e-5)
            assert torch.equal(alone[CACHE].keys, other[CACHE].keys)

    @pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in (140, 300)), 530])
    @torch.no_grad()
    def test_slots_that_the_mask_hides(first: int) -> None:
        """Those of earlier steps, in one piece and in several, and the tokens' own."""
        length = first + 20
        query, keys, values = torch.randn(1, 2, 4, 64), torch.randn(1, 2, length, 64), torch.randn(1, 2, length, 64)
        slots, places = torch.tensor([[first, first + 1]]), torch.arange(length)
        for window in (9, 600):
            mask = torch.where((places <= slots[..., None]) & (places > slots[..., None] - window), 0.0, -torch.inf)[:, None]
            wide = [part.repeat_interleave(2, dim=1) for part in (keys.nan_to_num(), values.nan_to_num())]
            wanted = nn.functional.scaled_dot_product_attention(query.transpose(1, 2), *wide, attn_mask=mask, scale=0.3)
            keys[:, :, first + 2 :], values[:, :, first + 2 :] = torch.nan, torch.nan  # what no query may look at
            for at in (slice(0, 2), slice(0, 1), slice(1, 2)):  # together, and each alone
                found = attend(query[:, at].contiguous(), (keys, values), mask[:, :, at], slots[:, at].contiguous(), 0.3)
                torch.testing.assert_close(found, wanted.transpose(1, 2).flatten(2)[:, at], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("tokens", [7, 70])
    @torch.no_grad()
    def test_a_layer_with_a_prompt(tokens: int) -> None:
        layer, x = _layer(hidden_size=192, num_attention_heads=3, intermediate_size=64), torch.randn(1, tokens, 192)
        slots, half = torch.arange(tokens)[None], torch.randn(1, tokens, 32)
        angles = torch.cat([half, half], -1)
        mask = torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
        found: list[Tensor] = []
        for run in (layer, prompt_of(layer, _refuse)):
            cache = RowCache(tokens + 9, layer.self_attn.config)
            cache.place(slots, 0, tokens, [tokens])
            out = run(x, attention_mask=mask, position_embeddings=(angles.cos(), angles.sin()), **{CACHE: cache})
            found.append(torch.cat([part.flatten() for part in (out, cache.of_layer(0).keys, cache.of_layer(0).values)]))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_what_is_no_prompt_runs_as_ever() -> None:
        layer, x = _layer(), torch.randn(1, 8, 64)
        other = prompt_of(layer, lambda *_, **__: None)
        part = _call(1, 8)
        cache = RowCache(20, layer.self_attn.config)
        assert other(x, **part) is None, "compiled steps' part of a cache"
        assert other(x, **part | {CACHE: DynamicCache()}) is None, "transformers' own"
        few = {**part, CACHE: cache, "position_embeddings": tuple(angle[:, :4] for angle in part["position_embeddings"])}
        assert other(x[:, :4], **few) is None, "a step"
        with torch.enable_grad():
            assert other(x, **part | {CACHE: cache}) is None
        cache.place(torch.arange(8)[None], 0, 8, [8])
        whole = part | {CACHE: cache, "attention_mask": part["attention_mask"][..., :8]}
        assert other(x, **whole) is not None

    @pytest.mark.parametrize("embedding_first", [False, pytest.param(True, marks=pytest.mark.slow)])
    @torch.no_grad()
    def test_a_module_of_a_chain(embedding_first: bool) -> None:
        rule = ChainRule(embedding_first=embedding_first, before_norm=True, zero_first=True, output="own")
        norms = [LlamaRMSNorm(64) for _ in range(3)]
        for norm in norms:
            nn.init.normal_(norm.weight)
        block = ChainedBlock(rule, norms[0], norms[1], nn.Linear(128, 64, bias=False), _layer(), norms[2])
        previous, embedding, call = torch.randn(1, 2, 64), torch.randn(1, 2, 64), _call(1, 2)
        other = LayerCall(args=(), kwargs=_copied(call))
        wanted = block(previous, embedding, LayerCall(args=(), kwargs=call))
        found = layer_steps.step_of(block, _refuse)(previous, embedding, other)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for part in (block.projection, block.hidden_norm, block.layer):
            part.forward = partial(type(part).forward, part)
            assert layer_steps.step_of(block, lambda *_: "compiled")(previous, embedding, other) == "compiled"
            del part.forward

    def test_tables() -> None:
        table = nn.Embedding(8, 64)
        assert layer_steps.is_table(table)
        assert not layer_steps.is_table(nn.Embedding(8, 64, max_norm=1.0))
        assert not layer_steps.is_table(nn.Embedding(8, 65))
        table.register_forward_hook(lambda *_: None)  # a head's own is asked too
        assert not layer_steps.is_table(table)

    @pytest.mark.parametrize("tokens", [1, 3, 4])
    @torch.no_grad()
    def test_choices(tokens: int, without_the_compiler: None) -> None:
        weight, hidden = torch.randn(192, 64), torch.randn(1, tokens, 64)
        weight[70] = weight[7]  # of equal ones the first
        hidden[0, -1] = weight[7]
        unembedding, ids, last = Unembedding(weight=weight), torch.randperm(192), torch.tensor([[tokens - 1]])
        for given in (hidden, None), (hidden, last):
            wanted = choose_best(unembedding, ids, *given, compiled=False)
            assert torch.equal(choose_best(unembedding, ids, *given, compiled=True), wanted)
        assert choose_best(unembedding, None, hidden, last, compiled=True).item() == 7
        drafts = unembedding.logits(hidden).argmax(-1)[:, :-1]
        drafts[:, 1:2] += 1
        wanted = judge(unembedding, hidden, drafts, exact=True, compiled=False)
        found = judge(unembedding, hidden, drafts, exact=True, compiled=True)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        assert found[3][0, -1] == 1, "a tie"

    @pytest.mark.parametrize(
        "unembedding",
        [
            {"bias": torch.zeros(192)},
            {"softcap": 5.0},
            {"scale": 2.0},
            {"weight": torch.randn(190, 64)},
            {"weight": torch.randn(64, 192).T},
        ],
    )
    def test_choices_that_are_left(unembedding: dict[str, Any]) -> None:
        given: dict[str, Any] = {"weight": torch.randn(192, 64)}
        changed = Unembedding(**given | unembedding)
        assert layer_steps.chooses_by_kernel(Unembedding(weight=torch.randn(192, 64)), torch.randn(1, 4, 64))
        assert not layer_steps.chooses_by_kernel(changed, torch.randn(1, 4, 64))
        assert not layer_steps.chooses_by_kernel(Unembedding(weight=torch.randn(192, 64)), torch.randn(2, 1, 64)), "two texts"

    def _watched(layer: LlamaDecoderLayer) -> None:
        layer.mlp.up_proj.register_forward_hook(lambda *_: None)

    def _other_linear(layer: LlamaDecoderLayer) -> None:
        layer.self_attn.o_proj = type("Adapted", (nn.Linear,), {})(128, 64, bias=False)

    def _half(layer: LlamaDecoderLayer) -> None:
        layer.mlp.gate_proj.bfloat16()

    @pytest.mark.parametrize(
        "change",
        [
            {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"intermediate_size": 96},
            {"intermediate_size": 4096}, _watched, _other_linear, _half,
        ],
    )  # fmt: skip
    @torch.no_grad()
    def test_layers_that_are_left(change: Any) -> None:
        layer = _layer(**change) if isinstance(change, dict) else _layer()
        if callable(change):
            change(layer)
        assert layer_steps.step_of(layer, lambda *_, **__: "compiled")(torch.randn(1, 2, 64), **_call(1, 2)) == "compiled"

    @torch.no_grad()
    def test_calls_that_are_left() -> None:
        layer, call = _layer(), _call(1, 2)
        step = layer_steps.step_of(layer, lambda *_, **__: "compiled")
        x = torch.randn(1, 2, 64)
        assert step(torch.randn(1, 7, 64), **_call(1, 7)) == "compiled", "too many tokens"
        assert step(torch.randn(2, 2, 64), **_call(2, 2)) == "compiled", "two texts"
        assert step(x, **call | {"attention_mask": call["attention_mask"] == 0}) == "compiled", "no numbers"
        assert step(x, **call | {CACHE: None}) == "compiled"
        long = Part(torch.zeros(1, 1, 576, 64), torch.zeros(1, 1, 576, 64), call[CACHE].slots)
        assert step(x, **call | {CACHE: long, "attention_mask": torch.zeros(1, 1, 2, 576)}) == "compiled", "too many slots"
        with torch.enable_grad():
            assert step(x, **call) == "compiled"

    def test_other_devices_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        with torch.no_grad():
            step = layer_steps.step_of(_layer(), lambda *_, **__: "compiled")
            assert step(torch.randn(1, 2, 64), **_call(1, 2)) == "compiled"

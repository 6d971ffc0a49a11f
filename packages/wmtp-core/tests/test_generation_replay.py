"""Decoding in the form that CUDA graphs replay: fixed widths, no row dropped before half are finished, tensors in place.

On a CPU nothing is recorded, so the halves of a step run each time; on a GPU they are graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from crossings import sampled
from tiny_config import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from wmtp import devices
from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.generation import Generation, Sampling, cache, choosing, generate, release, replay, step
from wmtp.loss import Unembedding
from wmtp.models import attention
from wmtp.models.acceleration import compile_layers
from wmtp.models.few_rows import compile_few_rows, linear_by_rows, matmul_by_rows
from wmtp.models.mtp import MTPModel

KINDS = ("block", "linear", "residual", "chained", "shared")
PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3], [20, 21], [30, 31] * 8, [11], [12, 13]]
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
SAMPLED = Sampling(temperature=1.1, top_p=0.9, seed=3)
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def _model(kind: str, device: str, base: torch.nn.Module | None = None) -> MTPModel:
    torch.manual_seed(0)
    base = base or LlamaForCausalLM(LlamaConfig(**SMALL))
    model = MTPModel(base.eval(), HeadsConfig(horizon=4, kind=kind, init="copy"), seed=1).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.extra_heads.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model.to(device)


def _llama(config: dict[str, Any]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config))


def _decode(model: MTPModel, sampling: Sampling, speculative: bool, new: int = 40) -> list[Generation]:
    def stop(tokens: Sequence[int]) -> bool:  # every row ends elsewhere
        return (31 * sum(tokens) + len(tokens)) % 23 == 0

    return generate(model, PROMPTS, max_new_tokens=new, eos_id=3, speculative=speculative, sampling=sampling, stop=stop)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(step, "_FIRST_WIDTH", 24)
    return request.param


def _replayed(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cpu":
        monkeypatch.setattr(step, "can_replay", lambda *_: True)
        monkeypatch.setattr(replay.Replay, "__call__", lambda self: self.function())


@pytest.mark.parametrize(("kind", "sampling", "speculative"), sampled(product(KINDS, (Sampling(), SAMPLED), (False, True)), 3))
def test_replayed_steps_give_what_plain_steps_give(
    kind: str, sampling: Sampling, speculative: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(kind, device)
    with monkeypatch.context() as plain:
        plain.setattr(step, "can_replay", lambda *_: False)
        wanted = _decode(model, sampling, speculative)
    _replayed(monkeypatch, device)
    found = _decode(model, sampling, speculative)
    assert [row.tokens for row in found] == [row.tokens for row in wanted]
    assert [row.finish for row in found] == [row.finish for row in wanted]
    assert len({len(row.tokens) for row in wanted}) > 1, "rows shall end at different steps"
    assert [row.drafts for row in found] == [row.drafts for row in wanted]


@pytest.mark.parametrize("kind", ["block", "shared"])
def test_ties_are_decided_between_the_halves(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "TIE", 0.3)  # most tokens are chosen by reading the row alone
    model = _model(kind, device)
    with monkeypatch.context() as plain:
        plain.setattr(step, "can_replay", lambda *_: False)
        wanted = _decode(model, Sampling(), True, new=12)
    _replayed(monkeypatch, device)
    assert _decode(model, Sampling(), True, new=12) == wanted


@pytest.mark.parametrize("worth", [1, 1000])
def test_a_finished_row_stays_until_half_are_and_dropping_them_is_worth_a_graph(
    worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _replayed(monkeypatch, "cpu")
    monkeypatch.setattr(step, "_WORTH_RECORDING", worth)
    sizes: list[int] = []
    look = step.Step._look_at

    def noted(self: step.Step) -> Any:
        sizes.append(len(self._lengths))
        return look(self)

    monkeypatch.setattr(step.Step, "_look_at", noted)
    _decode(_model("block", "cpu"), Sampling(), speculative=True)
    assert sizes[0] == len(PROMPTS)
    assert all(after == before or 2 * after <= before for before, after in pairwise(sizes))
    assert (sizes[-1] < sizes[0]) == (worth == 1)


@pytest.mark.parametrize("speculative", [False, True])
def test_a_request_takes_the_rows_of_an_earlier_one(speculative: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _replayed(monkeypatch, device)
    model = _model("chained", device)
    opened: list[int] = []
    make = step.Step.__init__
    monkeypatch.setattr(step.Step, "__init__", lambda self, *args, **named: (opened.append(1), make(self, *args, **named))[0])

    def ask(prompt: list[int], new: int, sampling: Sampling = SAMPLED) -> Generation:
        return generate(model, [prompt], max_new_tokens=new, eos_id=None, speculative=speculative, sampling=sampling)[0]

    wanted = []
    for prompt, new in (([9, 8, 7, 6] * 9, 40), ([5, 6, 7], 30)):
        wanted.append(ask(prompt, new))
        release(model)
    assert len(opened) == 2
    assert [ask([9, 8, 7, 6] * 9, 40), ask([5, 6, 7], 30)] == wanted
    assert len(opened) == 3
    ask([5, 6, 7], 120)
    ask([5, 6, 7], 120, Sampling())
    assert len(opened) == 5, "neither more tokens nor another way of choosing them fits"
    with torch.no_grad():
        model.base.lm_head.weight.copy_(-model.base.lm_head.weight)
    assert ask([5, 6, 7], 30).tokens != wanted[1].tokens, "weights that training has changed count"
    copied = copy.deepcopy(model)
    assert ask([5, 6, 7], 30) == generate(
        copied, [[5, 6, 7]], max_new_tokens=30, eos_id=None, speculative=speculative, sampling=SAMPLED
    )[0]  # fmt: skip


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_are_really_replayed(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    look = step.Step._look_at
    monkeypatch.setattr(step.Step, "_look_at", lambda self: (runs.append(1), look(self))[1])
    generate(_model("block", "cuda"), [[5, 6]], max_new_tokens=100, eos_id=None, sampling=sampling)
    assert len(runs) == 2, "once to warm up, once to record"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_next", "gemma2", "gpt_oss", "phi3"])
def test_what_graphs_cannot_hold_is_decoded_without(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = _model("block", "cuda", AutoModelForCausalLM.from_config(tiny_config(model_type)))
    with monkeypatch.context() as plain:
        plain.setattr(step, "can_replay", lambda *_: False)
        wanted = _decode(model, Sampling(), speculative=True, new=20)
    found = _decode(model, Sampling(), speculative=True, new=20)
    assert [row.tokens for row in found] == [row.tokens for row in wanted]
    print(model_type, "refused" if model.__dict__.get("_cannot_replay") else "replayed")


@pytest.mark.parametrize("kind", ["block", pytest.param("shared", marks=pytest.mark.slow)])
def test_compiled_steps_share_code_among_layers_and_decode_the_same(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from torch._dynamo.utils import counters

    def decode(model: MTPModel) -> list[tuple[int, ...]]:
        rows = generate(model, [[5, 6, 7]], max_new_tokens=8, eos_id=None, speculative=True, sampling=SAMPLED)
        return [row.tokens for row in rows]

    monkeypatch.setattr(step, "_FIRST_WIDTH", 256)
    if device == "cpu":
        request.getfixturevalue("without_the_compiler")
    graphs = []
    for layers in (2, 5):
        base = SMALL | {"num_hidden_layers": layers}
        plain, fast = (_model(kind, device, _llama(base)) for _ in range(2))
        wanted = decode(plain)
        torch._dynamo.reset()
        counters.clear()
        compile_layers(fast)
        with monkeypatch.context() as patch:
            _replayed(patch, device)
            assert decode(fast) == wanted
        assert not counters["graph_break"]
        graphs.append(counters["stats"]["unique_graphs"])
    assert 2 < graphs[1] == graphs[0], "code for steps, and none for a layer of its own"


def test_a_model_that_trained_with_block_attention_decodes_the_same() -> None:
    model, other = _model("block", "cpu"), _model("block", "cpu")
    assert other.use_block_attention()
    assert [row.tokens for row in _decode(other, Sampling(), True)] == [row.tokens for row in _decode(model, Sampling(), True)]


def test_few_tokens_attend_to_shared_keys_as_repeated_ones() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 4, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    mask = torch.rand(2, 1, 4, 20) > 0.3
    for place in (slice(0, 1), slice(0, 4)):
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, place], key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), attn_mask=mask[:, :, place]
        )
        found, _ = attention.attend(torch.nn.Identity(), query[:, :, place], key, value, mask[:, :, place])
        torch.testing.assert_close(found, wanted.transpose(1, 2), rtol=1e-5, atol=1e-6)
        for form in (mask[:, :, place], torch.where(mask[:, :, place], 0.0, -torch.inf)):
            repeated = (key.repeat_interleave(3, 1), value.repeat_interleave(3, 1))
            products = attention._by_products(query[:, :, place], *repeated, form, None)
            torch.testing.assert_close(products, wanted, rtol=1e-5, atol=1e-6)
    nothing = attention._by_products(query[:, :2], key, value, torch.zeros(2, 1, 4, 20, dtype=torch.bool), None)
    torch.testing.assert_close(nothing, value.mean(2, keepdim=True).expand(-1, -1, 4, -1))


@pytest.mark.parametrize("speculative", [False, True])
def test_a_cache_larger_than_memory_is_refused_before_it_is_made(speculative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "free_memory", lambda _: 1_000_000)
    model = _model("block", "cpu")
    generate(model, [[5, 6, 7]] * 4, max_new_tokens=20, eos_id=None, speculative=speculative)
    # 3 layers of keys and values, each of 64 rows, 2 heads, 103 slots and 12 for drafts, 8 numbers of 4 bytes
    with pytest.raises(
        ConfigError, match=r"cache of 64 rows of up to 115 tokens takes 2\.8 MB, and cpu has 1\.0 MB free.*batch_size"
    ):
        generate(model, [[5, 6, 7]] * 64, max_new_tokens=100, eos_id=None, speculative=speculative)


def test_free_memory_is_at_most_what_a_container_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    assert devices.free_memory(torch.device("cpu")) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (devices.free_memory(torch.device("cpu")) or 0) > 3_000_000


@pytest.mark.parametrize("kind", ["block", "chained"])
def test_a_tie_decided_otherwise_than_in_the_graph_drafts_again_from_what_was_decided(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(kind, "cpu")
    _replayed(monkeypatch, "cpu")
    wanted = _decode(model, Sampling(), speculative=True, new=12)

    def mistaken(unembedding: Unembedding, hidden: torch.Tensor, *given: Any, **options: Any) -> Any:
        return choosing.judge(unembedding, hidden.flip(-1), *given, **options)

    monkeypatch.setattr(choosing, "TIE", 10.0)  # all are tied
    monkeypatch.setattr(step, "judge", mistaken)
    assert _decode(model, Sampling(), speculative=True, new=12) == wanted


@pytest.mark.parametrize("size", [5, 97, 1024, 1300])
def test_the_two_largest_logits_are_found_in_blocks(size: int) -> None:
    torch.manual_seed(size)
    logits = torch.randn(3, 4, size)
    logits[0, 0, [1, size - 1]] = 9.0  # equal: the first counts
    unembedding = Unembedding(weight=torch.eye(size))
    best, first, second = choosing._best_two(logits)
    top = logits.topk(2, dim=-1).values
    assert torch.equal(best, logits.argmax(-1))
    assert torch.equal(torch.stack([first, second], dim=-1), top)
    assert torch.equal(choosing._best(unembedding, None, logits, None, choosing._in_blocks), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_few_rows_are_what_torch_multiplies(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rewritten = []

    def note(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
        rewritten.append([node.target for node in graph.graph.nodes if node.target in (linear_by_rows, matmul_by_rows)])
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", note)
    linear, longer = torch.nn.Linear(24, 17).to(dtype), torch.nn.Linear(1025, 17).to(dtype)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (4, 20, 20))

    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return linear(x), longer(y), (query @ key.transpose(-1, -2)) @ value

    torch._dynamo.reset()
    fast = compile_few_rows(function)
    few_short, few_long = (16, 8) if dtype == torch.float32 else (4, 4)
    for rows in (1, 4, 8, 9, 16, 17):
        x, y = torch.randn(1, rows, 24, dtype=dtype), torch.randn(1, rows, 1025, dtype=dtype)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
        for found, wanted in zip(fast(x, y), function(x, y), strict=True):
            torch.testing.assert_close(found, wanted, **tolerance)
        assert rewritten[-1] == [linear_by_rows] * ((rows <= few_short) + (rows <= few_long)) + [matmul_by_rows] * 2

"""Decoding in the form that CUDA graphs replay: fixed widths, no row dropped before half are finished, tensors in place.

On a CPU nothing is recorded, so the halves of a step run each time; on a GPU they are graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from tiny_config import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from wmtp.config.schema import HeadsConfig
from wmtp.generation import Generation, Sampling, generate, release, replay, step
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


def _decode(model: MTPModel, sampling: Sampling, speculative: bool, new: int = 60) -> list[Generation]:
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


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
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


def test_a_finished_row_stays_until_half_are(monkeypatch: pytest.MonkeyPatch) -> None:
    _replayed(monkeypatch, "cpu")
    sizes: list[int] = []
    look = step.Step._look_at

    def noted(self: step.Step) -> torch.Tensor:
        sizes.append(len(self._lengths))
        return look(self)

    monkeypatch.setattr(step.Step, "_look_at", noted)
    _decode(_model("block", "cpu"), Sampling(), speculative=True)
    assert sizes[0] == len(PROMPTS)
    assert all(after == before or 2 * after <= before for before, after in pairwise(sizes))


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
    ask([5, 6, 7], 200)
    ask([5, 6, 7], 200, Sampling())
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

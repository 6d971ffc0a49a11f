"""Parts of decoding that a GPU replays as graphs of their own: prompts, and rows that decide ties; here without recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crossings import sampled
from test_generation_replay import CUDA, KINDS, SAMPLED, SMALL, _llama, _model, _replayed
from tiny_config import tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from wmtp.generation import Generation, Sampling, alone, choosing, generate, step
from wmtp.generation.decoder import open_decoder
from wmtp.loss import Unembedding
from wmtp.models.acceleration import compile_layers
from wmtp.models.mtp import MTPModel

LONG = [[9, 8, 7, 6] * 9, [4, 3], [50] * 20]
SHORT = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3]]


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def _ask(model: MTPModel, prompts: list[list[int]], sampling: Sampling | None = None) -> list[Generation]:
    return generate(model, prompts, max_new_tokens=20, eos_id=None, speculative=True, sampling=sampling)


@pytest.mark.parametrize(("kind", "sampling"), sampled([(kind, s) for kind in KINDS for s in (Sampling(), SAMPLED)], 3))
def test_prompts_of_later_requests_are_read_by_a_graph(
    kind: str, sampling: Sampling, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as plain:
        plain.setattr(step, "can_replay", lambda *_: False)
        wanted = [_ask(_model(kind, device), prompts, sampling) for prompts in (LONG, SHORT)]
    _replayed(monkeypatch, device)
    read: list[int] = []
    whole = step.Step._whole_prompts
    monkeypatch.setattr(step.Step, "_whole_prompts", lambda self, length: (read.append(length), whole(self, length))[1])
    model = _model(kind, device)
    for turn in (0, 1, 0, 1):
        assert _ask(model, (LONG, SHORT)[turn], sampling) == wanted[turn]
    assert set(read) == {64}, "prompts of all lengths are padded to one"


def test_graphs_of_prompts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    _replayed(monkeypatch, "cpu")
    monkeypatch.setattr(step, "_WIDTHS", 4)
    monkeypatch.setattr(step, "_MOST_PROMPT_GRAPHS", 2)
    model = _model("linear", "cpu")
    for length in (40, 4, 8, 12, 8, 39):  # the first is read without a graph
        generate(model, [list(range(5, 5 + length))], max_new_tokens=2, eos_id=None)
    [kept] = model.__dict__["_kept_decoding"].values()
    assert list(kept._prompt_graphs) == [8, 40]


@pytest.mark.parametrize("kind", ["block", "chained"])
def test_a_tie_after_a_prompt_is_decided_behind_its_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _ask(_model(kind, "cpu"), SHORT)
    _replayed(monkeypatch, "cpu")
    model = _model(kind, "cpu")
    _ask(model, LONG)

    def mistaken(unembedding: Unembedding, hidden: torch.Tensor, *given: Any, **options: Any) -> Any:
        return choosing.judge(unembedding, hidden.flip(-1), *given, **options)

    monkeypatch.setattr(choosing, "TIE", 10.0)
    monkeypatch.setattr(step, "judge", mistaken)
    assert [row.tokens for row in _ask(model, SHORT)] == [row.tokens for row in wanted]


def test_ties_are_decided_without_compiling_a_length(monkeypatch: pytest.MonkeyPatch, without_the_compiler: None) -> None:
    from torch._dynamo.utils import counters

    _replayed(monkeypatch, "cpu")
    monkeypatch.setattr(step, "_FIRST_WIDTH", 256)
    graphs, texts = [], []
    for tie in (0.0, 10.0):
        monkeypatch.setattr(choosing, "TIE", tie)
        torch._dynamo.reset()
        counters.clear()
        model = _model("block", "cpu", _llama(SMALL | {"num_hidden_layers": 2}))
        compile_layers(model)
        texts.append([row.tokens for row in generate(model, [[5, 6, 7]], max_new_tokens=12, eos_id=None)])
        graphs.append(counters["stats"]["unique_graphs"])
    assert texts[0] == texts[1]
    assert graphs[0] == graphs[1] > 1


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_a_row_alone_is_padded_without_another_choice(model_type: str, device: str) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=100))
    if model_type != "gpt2":
        base = AutoModelForCausalLM.from_config(tiny_config(model_type))
    model = _model("linear", device, base)
    decoder = open_decoder(model, 90, 96)
    reader = alone.RowAlone(model, decoder, torch.device(device))
    assert reader._pads == (device == "cuda")
    reader._pads = True
    for length in (3, 40, 64, 65):  # the last is longer than gpt2's positions when padded
        ids = torch.randint(5, 90, (length,), device=device)
        with torch.no_grad():
            wanted, last = decoder.last_logits_alone(ids), torch.tensor([length - 1], device=device)
            padded = torch.nn.functional.pad(ids, (0, 70 - length))
            torch.testing.assert_close(decoder.last_logits_alone(padded, last), wanted, rtol=1e-4, atol=1e-4)
            assert [int(reader.choose(ids)) for _ in range(3)] == [int(wanted.argmax())] * 3


def test_a_draft_vocabulary_is_read_once_a_request_and_anew_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    _replayed(monkeypatch, "cpu")
    model = _model("linear", "cpu")
    _ask(model, SHORT)
    model.draft_ids = tuple(range(2, 40))
    taken: list[int] = []
    take = step.Drafter._take_rows
    monkeypatch.setattr(step.Drafter, "_take_rows", lambda self, *given: (taken.append(1), take(self, *given))[1])
    first = _ask(model, SHORT)
    with torch.no_grad():
        for parameter in model.extra_heads.parameters():
            parameter.neg_()
    second = _ask(model, SHORT)
    fresh = _model("linear", "cpu")
    fresh.load_state_dict(model.state_dict())
    fresh.draft_ids = model.draft_ids
    assert len(taken) == 2
    assert second == _ask(fresh, SHORT)
    assert [row.tokens for row in first] == [row.tokens for row in second]
    assert [row.drafts for row in first] != [row.drafts for row in second]


def test_layers_that_are_compiled_after_a_request_are_not_decoded_by_its_graphs(
    monkeypatch: pytest.MonkeyPatch, without_the_compiler: None
) -> None:
    _replayed(monkeypatch, "cpu")
    model = _model("block", "cpu", _llama(SMALL | {"num_hidden_layers": 2}))
    wanted = _ask(model, SHORT)
    [kept] = model.__dict__["_kept_decoding"].values()
    compile_layers(model)
    assert _ask(model, SHORT) == wanted
    assert list(model.__dict__["_kept_decoding"].values())[-1] is not kept

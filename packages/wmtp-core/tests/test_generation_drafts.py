"""Speculation by fewer heads than a model has: as by a model that has no more."""

from __future__ import annotations

import argparse

import pytest
import torch
from attrs import evolve
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.cli.generate import add_decoding, speculation
from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.generation import Sampling, generate
from wmtp.generation.decoding import count_drafts
from wmtp.models.mtp import MTPModel

PROMPTS = [[5, 6, 7, 8], [9] * 6, [11, 12]]
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3,
}  # fmt: skip


def _model(kind: str, horizon: int = 5) -> MTPModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model = MTPModel(base, HeadsConfig(horizon=horizon, kind=kind, init="copy"), seed=1).eval()  # type: ignore[arg-type]
    with torch.no_grad():  # heads that are nearly head 1's own: some drafts are right in a text that repeats itself
        for parameter in model.extra_heads.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model


def _cut(model: MTPModel, drafts: int) -> MTPModel:
    fewer = MTPModel(model.base, evolve(model.heads, horizon=drafts + 1), seed=0).eval()
    fewer.extra_heads = nn.ModuleList(list(model.extra_heads)[:drafts])
    return fewer


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["block", "chained", "shared", "residual", "linear"])
def test_the_first_heads_draft_as_in_a_model_of_their_own(kind: str, sampling: Sampling) -> None:
    model = _model(kind)
    for drafts in (1, 2, 3):
        rows = generate(model, PROMPTS, max_new_tokens=40, eos_id=None, speculative=drafts, sampling=sampling)
        assert rows == generate(
            _cut(model, drafts), PROMPTS, max_new_tokens=40, eos_id=None, speculative=True, sampling=sampling
        )
        assert all(len(row.drafts.tested) == drafts for row in rows)
        assert sum(row.drafts.accepted[0] for row in rows)


def test_a_number_of_drafts_and_all() -> None:
    model = _model("chained")
    assert [count_drafts(model, wanted) for wanted in (False, True, 0, 1, 4)] == [0, 4, 0, 1, 4]
    every = generate(model, PROMPTS, max_new_tokens=20, eos_id=None, speculative=True)
    assert every == generate(model, PROMPTS, max_new_tokens=20, eos_id=None, speculative=4)
    plain = generate(model, PROMPTS, max_new_tokens=20, eos_id=None)
    assert [row.tokens for row in every] == [row.tokens for row in plain]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (5, r"5 drafts a step; the heads of this model draft at most 4 \(H = 5\)"),
        (-1, "must be true, false or a number of drafts, not -1"),
        (1.5, "must be true, false or a number of drafts, not 1.5"),
    ],
)
def test_a_number_that_cannot_be(wanted: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(_model("chained"), [[1, 2]], max_new_tokens=4, eos_id=None, speculative=wanted)  # type: ignore[arg-type]


def test_the_option_of_commands() -> None:
    parser = argparse.ArgumentParser()
    add_decoding(parser)
    given = [[], ["--speculative"], ["--speculative", "--drafts", "1"], ["--drafts", "3", "--speculative"]]
    found = [speculation(parser.parse_args(options)) for options in given]
    assert found == [False, True, 1, 3]
    assert [type(each) for each in found] == [bool, bool, int, int]
    with pytest.raises(ConfigError, match="--drafts: has no effect without --speculative"):
        speculation(parser.parse_args(["--drafts", "3"]))

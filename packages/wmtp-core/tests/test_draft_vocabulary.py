"""Heads that draft from the frequent tokens alone: the same text, and kept with the model."""

import json

import numpy as np
import pytest
import torch
from test_cli_generate import _save
from test_generation import KINDS, PROMPTS, SMALL
from transformers import LlamaConfig, LlamaForCausalLM

import wmtp
from wmtp.cli import main
from wmtp.config.schema import HeadsConfig
from wmtp.errors import WMTPError
from wmtp.generation import Sampling, generate
from wmtp.models.draft_vocabulary import frequent_tokens
from wmtp.models.mtp import MTPModel

FEW = (2, 3, 5, 20, 41, 77)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_same_and_only_these_are_drafted(kind, monkeypatch):
    torch.manual_seed(0)
    model = MTPModel(LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), HeadsConfig(horizon=3, kind=kind), seed=0)
    plain = [row.tokens for row in generate(model, PROMPTS, max_new_tokens=12, eos_id=3)]
    model.draft_ids = FEW
    drafted = []
    take = torch.stack

    def seen(tensors, dim=0):
        out = take(tensors, dim=dim)
        if dim == 1 and out.dtype == torch.int64:
            drafted.append(out)
        return out

    monkeypatch.setattr(torch, "stack", seen)
    assert [row.tokens for row in generate(model, PROMPTS, max_new_tokens=12, eos_id=3, speculative=True)] == plain
    assert drafted
    assert set(torch.cat([draft.flatten() for draft in drafted]).tolist()) <= set(FEW)
    monkeypatch.undo()
    sampled = generate(model, PROMPTS, max_new_tokens=12, eos_id=3, speculative=True, sampling=Sampling(temperature=1.0))
    assert all(0 <= token < 97 for row in sampled for token in row.tokens)


def test_it_is_kept_with_the_model(tmp_path, capsys):
    folder = _save(tmp_path / "model")
    model = wmtp.load_model(folder)
    assert model.draft_ids is None
    model.draft_ids = FEW
    model.save_pretrained(folder)
    assert wmtp.load_model(folder).draft_ids == FEW
    for layout in ("meta", "medusa"):
        assert main(["export", str(folder), str(tmp_path / layout), "--format", layout]) == 2
        assert "cannot say that heads 2..H draft from 6 of 258 tokens" in capsys.readouterr().err
    description = folder / "mtp_heads.json"
    content = json.loads(description.read_text())
    for wrong in ([], [300], "all"):
        description.write_text(json.dumps(content | {"draft_vocabulary": wrong}))
        with pytest.raises(WMTPError, match="draft_vocabulary holds no ids of this model's 258 tokens"):
            wmtp.load_model(folder)


class Counted:
    def __init__(self, counts):
        self._counts = counts

    def token_counts(self, size):
        return np.array(self._counts, np.int64)


def test_the_most_frequent_and_the_ends_are_chosen():
    data = Counted([5, 0, 9, 1, 9, 2])
    assert frequent_tokens(data, 3, 6, [1]) == (1, 2, 4)
    assert frequent_tokens(data, 1, 6, [1, 3]) == (1, 3), "a text can always end"
    assert frequent_tokens(data, 6, 6, []) == (0, 1, 2, 3, 4, 5)


def test_a_run_chooses_them_and_says_what_is_wrong(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a", "completion": "bcb" * 8}) + "\n" for _ in range(8)))
    config = {
        "run": {"output_dir": str(tmp_path / "runs"), "name": "x"},
        "models": {
            "base": {
                "type": "scratch", "vocab_size": 258, "hidden_size": 16, "layers": 2, "attention_heads": 2, "max_positions": 64,
                "heads": {"horizon": 3, "draft_vocabulary": 4},
            }
        },
        "tokenizer": {"type": "bytes"},
        "datasets": {"d": {"type": "jsonl", "uri": str(data)}},
        "data": {"train": {"max_length": 32, "batch_size": 4}},
        "trainer": {"type": "baseline-mtp"},
        "train": {"max_steps": 2},
        "checkpoints": {"save_final": False},
        "tracker": {"type": "jsonl"},
    }  # fmt: skip
    result = wmtp.run(config, overrides=["devices.device=cpu"])
    assert set(wmtp.load_model(result.run_dir).draft_ids) == {256, ord("a"), ord("b"), ord("c")}
    with pytest.raises(wmtp.ConfigError, match="draft_vocabulary: 300, but the model has a vocabulary of 258"):
        wmtp.run(config, overrides=["models.base.heads.draft_vocabulary=300", "run.name=y", "devices.device=cpu"])

"""Heads that draft from the frequent tokens alone: the same text, and kept with the model."""

import json

import numpy as np
import pytest
import torch
from decoded_models import KINDS, PROMPTS, SMALL
from test_cli_generate import _save
from transformers import LlamaConfig, LlamaForCausalLM

import wmtp
from wmtp.cli import main
from wmtp.config.model_rules import model_problems
from wmtp.config.schema import HeadsConfig
from wmtp.errors import FileError
from wmtp.generation import Sampling, generate, step
from wmtp.models.draft_vocabulary import frequent_tokens
from wmtp.models.mtp import MTPModel

FEW = (2, 3, 5, 20, 41, 77)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_same_and_only_these_are_drafted(kind, monkeypatch):
    torch.manual_seed(0)
    model = MTPModel(LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), HeadsConfig(horizon=3, kind=kind), seed=0)
    plain = [row.tokens for row in generate(model, PROMPTS, max_new_tokens=12, eos_id=3)]
    model.draft_ids = FEW
    drafted, judge = [], step.judge

    def seen(unembedding, hidden, drafts, **kwargs):
        drafted.append(drafts.clone())
        return judge(unembedding, hidden, drafts, **kwargs)

    monkeypatch.setattr(step, "judge", seen)
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
        with pytest.raises(FileError, match="draft_vocabulary holds no ids of this model's 258 tokens"):
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


def run_config(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a", "completion": "bcb" * 8}) + "\n" for _ in range(8)))
    return {
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


def test_a_run_chooses_them_and_says_what_is_wrong(tmp_path):
    config = run_config(tmp_path)
    result = wmtp.run(config, overrides=["devices.device=cpu"])
    assert set(wmtp.load_model(result.run_dir).draft_ids) == {256, ord("a"), ord("b"), ord("c")}
    with pytest.raises(wmtp.ConfigError, match="draft_vocabulary: 300, but the model has a vocabulary of 258"):
        wmtp.run(config, overrides=["models.base.heads.draft_vocabulary=300", "run.name=y", "devices.device=cpu"])


def test_check_says_that_the_vocabulary_is_smaller(tmp_path):
    config = run_config(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for content in ({"model_type": "llama", "vocab_size": 258}, {"model_type": "gemma3", "text_config": {"vocab_size": 258}}):
        (folder / "config.json").write_text(json.dumps(content))
        for of_hf in (False, True):
            changed = json.loads(json.dumps(config))
            if of_hf:
                changed["models"]["base"] = {"type": "hf", "uri": str(folder), "heads": changed["models"]["base"]["heads"]}
            for size, wrong in ((258, False), (259, True)):
                changed["models"]["base"]["heads"]["draft_vocabulary"] = size
                problems = list(model_problems(wmtp.load_config(changed)))
                assert [problem.message for problem in problems if "vocabulary of 258" in problem.message] == (
                    [f"{size}, but the model has a vocabulary of 258; write less, or leave it out"] if wrong else []
                )


def test_the_start_is_measured_and_a_tiny_effective_sample_is_warned_of(tmp_path, caplog):
    config = run_config(tmp_path)
    weights = [["b", 0.0], ["c", 1.0], ["b" * 300, 0.0]]
    text = "".join(part for part, _ in weights)
    record = {"prompt": "a", "completion": text, "weights": weights}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for _ in range(8)))
    base = config["models"]["base"] | {"max_positions": 512, "heads": {"horizon": 2}}
    data = {"train": {"max_length": 512, "batch_size": 4}, "eval": {"holdout": 0.25}}
    changed = config | {"models": {"base": base}, "data": data, "trainer": {"type": "column"}}
    changed["train"] = {"max_steps": 2, "eval_start": True}
    result = wmtp.run(changed, overrides=["devices.device=cpu"])
    steps = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert steps[0]["eval/loss/head_1"] > steps[2]["eval/loss/head_1"]
    assert "eval/tokens_per_forward" in steps[0]
    by_document = json.loads((result.run_dir / "eval-documents.json").read_text())
    for head, (sums, counts) in by_document.items():
        assert len(counts) == 2, "a quarter of eight documents is held out"
        assert sum(sums) / sum(counts) == pytest.approx(steps[2][f"eval/loss/{head}"], rel=1e-4)
    said = json.loads((result.run_dir / "sample.json").read_text())
    assert said.keys() == {"prompt", "before", "after"}
    assert said["prompt"]
    warned = [record.getMessage() for record in caplog.records if "effective sample" in record.getMessage()]
    assert len(warned) == 1, warned
    assert warned[0].startswith("step 1: the weights leave an effective sample of ")

"""critic-wmtp with a real reward model: its own vocabulary, its scores kept by content, and what is no reward model."""

import json
import shutil

import attrs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from wmtp import load_config, run
from wmtp.errors import ConfigError, WMTPError
from wmtp.models import reward as reward_module
from wmtp_algos import CriticWMTP, critic_wmtp

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_tokenizer(folder, **names):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["x = 1 + 2", "return y"], trainers.BpeTrainer(special_tokens=["<s>", "</s>", "[PAD]"], initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **names)
    wrapped.save_pretrained(str(folder))
    return len(wrapped)


@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    """A Llama with a score, whose tokenizer has no token for padding."""
    folder = tmp_path_factory.mktemp("rm")
    size = make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=size, num_labels=1, max_position_embeddings=64, **SIZES)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(30)
    model.save_pretrained(str(folder))
    return folder


def config_of(folder, rm, *overrides, **trainer):
    data = folder / "code.jsonl"
    if not data.exists():
        lines = [
            {"id": f"d{i}", "prompt": f"f{i}:", "completion": f"x = {i * i}" + " + 1" * (i % 4), "is_correct": bool(i % 3)}
            for i in range(30)
        ]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = load_config(
        {
            "run": {"output_dir": str(folder / "runs")},
            "models": {
                "base": {
                    "type": "scratch", "vocab_size": 258, "hidden_size": 16, "layers": 2, "attention_heads": 2,
                    "intermediate_size": 16, "max_positions": 64, "heads": {"horizon": 2},
                },
                "rm": {"type": "hf", "uri": str(rm)},
            },
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "jsonl", "uri": str(data)}},
            "data": {"train": {"max_length": 32, "batch_size": 6}, "cache_dir": str(folder / "tokens")},
            "trainer": {"type": "critic-wmtp"},
            "train": {"max_steps": 4},
            "checkpoints": {"save_final": False},
            "tracker": {"type": "jsonl"},
        },
        overrides,
    )  # fmt: skip
    return attrs.evolve(plain, trainer=CriticWMTP(**{"reward": "model", "value_steps": 2, "reward_batch_size": 4} | trainer))


def lines_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory_gib")} for line in lines]


def scores_in(folder):
    (file,) = (folder / "tokens").glob("*.rewards.f32")
    return np.fromfile(file, np.float32)


def plain_scores(folder, rm, template="{prompt}{completion}"):
    """Each text alone through transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(rm), AutoModelForSequenceClassification.from_pretrained(rm).eval()
    found = []
    for line in (folder / "code.jsonl").read_text().splitlines():
        ids = tokenizer(template.format(**json.loads(line)), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(float(model(input_ids=ids).logits[0, 0]))
    return np.array(found)


def test_scores_are_the_models_own_and_computed_once(tmp_path, rm, monkeypatch):
    seen = []

    class Watched(critic_wmtp.CriticWMTPTrainer):
        def _reward(self, document):
            seen.append((document.index, super()._reward(document)))
            return seen[-1][1]

    monkeypatch.setattr(critic_wmtp, "CriticWMTPTrainer", Watched)
    first = run(config_of(tmp_path, rm), run_name="first").run_dir
    expected = plain_scores(tmp_path, rm)
    np.testing.assert_allclose(scores_in(tmp_path), expected, rtol=1e-4, atol=1e-5)
    white = (expected - expected.mean()) / expected.std()
    assert len({index for index, _ in seen}) > 10
    for index, value in seen:
        assert value == pytest.approx(white[index], rel=1e-3, abs=1e-4)

    def no_model(*_, **__):
        raise AssertionError("the reward model was loaded again")

    monkeypatch.setattr(reward_module, "RewardModel", no_model)
    second = run(config_of(tmp_path, rm), run_name="second").run_dir
    assert lines_of(second) == lines_of(first)


def test_a_scoring_that_was_interrupted_goes_on(tmp_path, rm, monkeypatch):
    scored = []
    original = reward_module.RewardModel.scores

    def dies(self, texts):
        scored.append(len(texts))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return original(self, texts)

    monkeypatch.setattr(reward_module.RewardModel, "scores", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config_of(tmp_path, rm), run_name="x")
    assert np.isnan(scores_in(tmp_path)).sum() == 30 - 8
    scored[:] = [0] * 10
    run(config_of(tmp_path, rm), run_name="y")
    assert sum(scored) == 22
    np.testing.assert_allclose(scores_in(tmp_path), plain_scores(tmp_path, rm), rtol=1e-4, atol=1e-5)


def test_what_decides_the_scores_decides_their_file(tmp_path, rm):
    files = lambda: len(list((tmp_path / "tokens").glob("*.rewards.f32")))
    run(config_of(tmp_path, rm), run_name="a")
    run(config_of(tmp_path, rm, reward_template="Q {prompt} A {completion}!"), run_name="b")
    assert files() == 2
    other = tmp_path / "other"
    shutil.copytree(rm, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    run(config_of(tmp_path, other), run_name="c")
    assert files() == 3


def test_the_template_is_what_the_model_reads(tmp_path, rm):
    run(config_of(tmp_path, rm, reward_template="Q {prompt} A {completion}!"), run_name="a")
    expected = plain_scores(tmp_path, rm, "Q {prompt} A {completion}!")
    np.testing.assert_allclose(scores_in(tmp_path), expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_with_padding_of_its_own(tmp_path):
    folder = tmp_path / "rm"
    size = make_tokenizer(folder, pad_token="[PAD]")
    config = BertConfig(vocab_size=size, num_labels=1, max_position_embeddings=64, pad_token_id=2, **SIZES)
    BertForSequenceClassification(config).save_pretrained(str(folder))
    run(config_of(tmp_path, folder), run_name="x")
    np.testing.assert_allclose(scores_in(tmp_path), plain_scores(tmp_path, folder), rtol=1e-4, atol=1e-5)


def test_without_labels_every_document_is_learned_if_asked(tmp_path, rm):
    config = config_of(tmp_path, rm, train_on="all")
    lines = [json.loads(line) for line in (tmp_path / "code.jsonl").read_text().splitlines()]
    (tmp_path / "code.jsonl").write_text(
        "".join(json.dumps({k: line[k] for k in ("prompt", "completion")}) + "\n" for line in lines)
    )
    assert [line["stage"] for line in lines_of(run(config, run_name="x").run_dir)] == ["value"] * 2 + ["train"] * 2
    with pytest.raises(ConfigError, match=r"datasets.code: none of its 30 documents .* trainer.train_on = 'correct' needs"):
        run(config_of(tmp_path, rm), run_name="y")


# --- what is no reward model


def causal(folder):
    size = make_tokenizer(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=size, **SIZES)).save_pretrained(str(folder))


def two_outputs(folder):
    size = make_tokenizer(folder)
    LlamaForSequenceClassification(LlamaConfig(vocab_size=size, num_labels=2, **SIZES)).save_pretrained(str(folder))


def without_tokenizer(folder):
    LlamaForSequenceClassification(LlamaConfig(vocab_size=90, num_labels=1, **SIZES)).save_pretrained(str(folder))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (causal, ConfigError, "models.rm: .* holds LlamaForCausalLM with 2 output.s., not a reward model"),
        (two_outputs, ConfigError, "models.rm: .* with 2 output.s., not a reward model"),
        (without_tokenizer, WMTPError, "holds no tokenizer"),
    ],
)
def test_what_is_no_reward_model(tmp_path, make, kind, words):
    folder = tmp_path / "rm"
    folder.mkdir()
    make(folder)
    for arguments in ({"dry_run": True}, {"run_name": "x"}):
        with pytest.raises(kind, match=words):
            run(config_of(tmp_path, folder), **arguments)


def test_a_score_that_is_missing_is_never_random(tmp_path, rm):
    folder = tmp_path / "rm"
    shutil.copytree(rm, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WMTPError, match=r"score.weight is missing"):
        run(config_of(tmp_path, folder), run_name="x")


def test_a_score_that_says_nothing(tmp_path, rm):
    folder = tmp_path / "rm"
    shutil.copytree(rm, folder)
    weights = load_file(folder / "model.safetensors")
    for value, words in (
        (0.0, "gives all 30 documents the same score"),
        (float("nan"), "the score of 'd.*' in datasets.code is not"),
    ):
        weights["score.weight"].fill_(value)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(WMTPError, match=words):
            run(config_of(tmp_path, folder), run_name="x")


def test_a_reward_model_of_another_loader(tmp_path, rm):
    override = 'models.rm={type="meta-mtp",uri="' + str(rm) + '"}'
    with pytest.raises(ConfigError, match=r"models.rm.type: 'meta-mtp' loads no reward model; write 'hf'"):
        run(config_of(tmp_path, rm, override), dry_run=True)

"""Models from scratch, and whether a tokenizer belongs to a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.models import MTPModel
from wmtp.models.config import ScratchModel
from wmtp.models.outline import outline
from wmtp.models.vocabulary import check_vocabulary, compare_tokenizers
from wmtp.tokenizers.base import Tokenizer
from wmtp.training.memory import head_parameters

SMALL = {"vocab_size": 61, "hidden_size": 32, "layers": 2, "attention_heads": 4}


def load(seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    return ScratchModel(**{**SMALL, **options}).build().load(None, dtype=dtype, seed=seed).model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gpt2", "gpt_neox", "mixtral"])
def test_architectures(architecture: str):
    model = load(architecture=architecture, max_positions=40)
    info = ScratchModel(**SMALL, architecture=architecture, max_positions=40).build().info(None)
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (info.layers, info.hidden_size, info.vocab_size, info.max_positions) == (2, 32, 61, 40)
    assert info.architecture == type(model).__name__
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 61)


def test_fields_reach_the_model():
    model = load(kv_heads=2, intermediate_size=40, tie_embeddings=True, options={"rms_norm_eps": 0.5})
    assert model.config.num_key_value_heads == 2
    assert model.config.intermediate_size == 40
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == 0.5
    assert load().config.num_key_value_heads == 4


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_feed_forward_layers_are_four_times_as_wide_as_the_model(architecture: str):
    model = load(architecture=architecture)
    widths = {size for name, tensor in model.named_parameters() if "mlp" in name or "fc" in name for size in tensor.shape}
    assert not widths - {2, 8, 32, 128, 256}
    shape = ScratchModel(**SMALL, architecture=architecture)
    if architecture != "qwen3" and (found := outline(shape)) is not None:  # its heads are 128 wide
        assert found.parameters == pytest.approx(shape.build().info(None).parameters, rel=0.01)


@pytest.mark.parametrize("kind", ["block", "linear", "residual", "chained", "shared"])
def test_the_dry_run_counts_the_parameters_that_the_run_has(kind: Any):
    heads = HeadsConfig(kind=kind, horizon=3)
    info = ScratchModel(**SMALL).build().info(None)
    model = MTPModel(load().eval(), heads, seed=0)
    assert info.parameters == sum(parameter.numel() for parameter in model.base.parameters())
    assert head_parameters(info, heads) == sum(parameter.numel() for parameter in model.extra_heads.parameters())


def test_weights_come_from_the_seed_alone():
    state = torch.get_rng_state()
    first = load(seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = load(seed=1).state_dict(), load(seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_bf16_keeps_its_rotary_frequencies_in_fp32():
    model = load(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, load().model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "lama"}, "models.base.architecture: transformers knows no 'lama'; did you mean 'llama'?"),
        ({"architecture": "t5"}, "no decoder-only causal language model of the architecture 't5'"),
        ({"options": {"rms_norm_epsilon": 1e-5}}, "models.base.options.rms_norm_epsilon: .* did you mean 'rms_norm_eps'"),
        ({"options": {"hidden_size": 64}}, "models.base.options.hidden_size: write models.base.hidden_size instead"),
        ({"architecture": "gpt2", "kv_heads": 2}, "models.base.kv_heads: 'gpt2' has no num_key_value_heads"),
        ({"attention_heads": 5}, "models.base: transformers cannot make this model: .*not a multiple of"),
        ({"options": {"hidden_act": "nonsense"}}, "models.base: transformers cannot make this model"),
    ],
)
def test_mistakes(options: dict, message: str):
    loader = ScratchModel(**{**SMALL, **options}).build()
    with pytest.raises(ConfigError, match=message):
        loader.info(None)
    with pytest.raises(ConfigError, match=message):
        loader.load(None, dtype=torch.float32, seed=0)


class Words(Tokenizer):
    """Every word has an id."""

    def __init__(self, words: list[str], eos_id: int = 0) -> None:
        self._words = words
        self._eos_id = eos_id

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    @property
    def eos_id(self) -> int:
        return self._eos_id

    def encode(self, text: str) -> list[int]:
        return [self._words.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self._words[token] for token in ids)

    def token(self, token_id: int) -> str:
        return self._words[token_id]

    def fingerprint(self) -> str:
        return repr((self._words, self._eos_id))

    def save(self, folder: Path) -> None:
        (folder / "words.txt").write_text("\n".join(self._words))


def words(count: int) -> Words:
    return Words([f"w{index}" for index in range(count)])


def test_a_tokenizer_that_fits():
    check_vocabulary(100, words(100))
    check_vocabulary(1124, words(100), own=False)
    check_vocabulary(99, words(100))  # the data decide
    check_vocabulary(2000, words(100))  # it is the model's own


def test_a_tokenizer_of_another_model():
    with pytest.raises(ConfigError, match=r"1125, .* only 100: it is not"):
        check_vocabulary(1125, words(100), own=False)


def test_equal_and_different_tokenizers():
    compare_tokenizers(words(5), words(5))
    with pytest.raises(ConfigError, match=r"models\.ref: its tokenizer has 4 tokens, that of the base model 5"):
        compare_tokenizers(words(5), words(4))
    with pytest.raises(ConfigError, match="token 2 is 'x' in place of 'w2'"):
        compare_tokenizers(words(4), Words(["w0", "w1", "x", "y"]))
    with pytest.raises(ConfigError, match="ends a text with token 1, that of the base model with 0"):
        compare_tokenizers(words(2), Words(["w0", "w1"], eos_id=1))

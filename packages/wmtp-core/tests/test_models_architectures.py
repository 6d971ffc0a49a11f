"""A sample of transformers' architectures, each in everything; the whole walk is slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_config import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, Gemma4TextConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from walk_architectures import STEPS, examine

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.models.anatomy import dissect, find_layers
from wmtp.models.config_fields import field, layer_count, layer_kinds
from wmtp.models.loaders.describe import describe, empty_model
from wmtp.models.mtp import MTPModel
from wmtp.storage.architectures import linear_maps

#: architecture → what is refused of it, by the words of the refusal; all else must work
SAMPLE: dict[str, dict[str, str]] = {
    "llama": {},
    "gpt2": {},
    "deepseek_v3": {},
    "gemma4_text": {},
    "gpt_oss": {},
    "lfm2": {},
    "mamba2": {},
    "qwen3_5_text": {},
    "bloom": {"packed": "a document sees the one before it", "decode": "cannot be decoded", "speculate": "cannot be decoded"},
    "doge": {"packed": "differently in a row of several than alone", "decode": "in pieces", "speculate": "in pieces"},
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_an_architecture_does_everything_but_what_is_refused(model_type: str, tmp_path: Path):
    found = examine(model_type, tmp_path)
    assert set(found) == set(STEPS)
    for step, text in found.items():
        refusal = SAMPLE[model_type].get(step)
        if refusal is None:
            assert text == "ok", step
        else:
            assert text.startswith("refused: "), text
            assert refusal in text


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_no_architecture_crashes_or_goes_wrong(model_type: str, tmp_path: Path):
    for step, text in examine(model_type, tmp_path).items():
        assert step == "make" or text.startswith(("ok", "refused: ")), (step, text)


def check_names_of_maps(model_type: str) -> None:
    config = tiny_config(model_type)
    model = empty_model(config)
    try:
        layers = find_layers(model, model.base_model, ConfigError)
    except ConfigError:  # it gets no adapters
        return
    inside = {id(module) for module in layers.modules()}
    maps = linear_maps(config.to_dict())
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and id(module) in inside]
    assert maps is None or not [problem for name in names if (problem := maps.problem(name))]


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "phi3", "gemma3_text", "fuyu"])
def test_no_linear_map_of_a_model_is_unknown_to_its_source(model_type: str):
    check_names_of_maps(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_no_linear_map_of_any_model_is_unknown_to_its_source(model_type: str):
    try:
        empty_model(tiny_config(model_type))
    except Exception as error:  # `examine` counts these
        pytest.skip(f"transformers cannot make it: {error}")
    check_names_of_maps(model_type)


def test_fields_that_differ_between_layers_are_read():
    config = tiny_config("gemma4_text")
    assert isinstance(config, Gemma4TextConfig)
    assert field(config, "head_dim") == 16  # 8 in the layers with a window
    assert field(config, "no_such_field", 7) == 7
    info = describe(empty_model(config))
    assert (info.layers, info.kv_size) == (layer_count(config), 32)
    assert layer_kinds(config) == ("sliding_attention", "full_attention", "full_attention")


def test_an_encoder_is_refused_by_what_it_is():
    config = BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    with pytest.raises(ConfigError, match=r"a token sees those after it.*it is an encoder \(is_decoder = false.*decoder-only"):
        MTPModel(model, HeadsConfig(horizon=2), seed=0)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        (
            "modernbert-decoder",
            "between its last hidden state and its unembedding it has ModernBertDecoderPredictionHead, which",
        ),
        ("gemma3n_text", r"its layers pass on 2 streams of hidden states at once \(shape 2 × 1 × 6 × 32\), and a head"),
        ("inkling2_text", "Inkling2BlockAttentionResidual, behind its last layer, takes more than that layer's hidden states"),
    ],
)
def test_a_model_that_heads_cannot_continue_is_refused_by_what_it_is(model_type: str, reason: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    with pytest.raises(ConfigError, match=rf"cannot get multi-token heads: {reason}"):
        dissect(model)


def test_layers_that_count_twice_are_found():
    """A layer of LongCat-Flash has two attentions, and num_hidden_layers counts these."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("longcat_flash")).eval()
    assert (layer_count(model.config), len(dissect(model).layers)) == (6, 3)


def test_a_model_that_transformers_cannot_build_is_refused():
    """DBRX's attention asks its config for a field that transformers gives no default."""
    config = tiny_config("dbrx")
    del config.attn_config.rope_theta
    with pytest.raises(ConfigError, match=r"cannot make this model: .*rope_theta.*'dbrx'"):
        empty_model(config)


def test_the_reason_behind_the_title_of_transformers_error_is_said(monkeypatch):
    """Its validation names a validator in the first line, and what is wrong below; when it runs depends on its version."""

    def validate(model, config):
        raise ValueError("Class validation error for validator 'x':\n    ValueError: 16 is not a multiple of 3.")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", validate)
    with pytest.raises(ConfigError) as refused:
        empty_model(tiny_config("llama"))
    (problem,) = refused.value.problems
    assert "ValueError: Class validation error for validator 'x': ValueError: 16 is not a multiple of 3. ('llama'" in problem
    assert "\n" not in problem


def test_a_model_of_no_single_stack_is_refused():
    with pytest.raises(ConfigError, match=r"'blt' has no num_hidden_layers"):
        describe(AutoModelForCausalLM.from_config(tiny_config("blt")))

"""Saving is tried when a model is opened: what transformers would refuse is repaired and said, or an error then."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from wmtp.errors import WMTPError
from wmtp.models import load_model
from wmtp.models.saving import make_savable
from wmtp.tokenizers.bytes import BytesTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        ({"do_sample": False, "temperature": 0.6}, ["temperature"]),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 5}, ["temperature", "top_p", "top_k"]),
        ({"do_sample": False, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1}, ["min_p", "typical_p", "epsilon_cutoff"]),
        ({"num_beams": 1, "early_stopping": True, "length_penalty": 0.5}, ["early_stopping", "length_penalty"]),
        ({"output_scores": True, "temperature": 0.6}, ["output_scores", "temperature"]),
        ({"num_return_sequences": 3}, ["num_return_sequences"]),
        ({"pad_token_id": -1}, ["pad_token_id"]),
        ({"suppress_tokens": [3], "forced_eos_token_id": 3}, ["forced_eos_token_id"]),
    ],
)
def test_contrary_settings_are_taken_out_and_named(folder, tmp_path, caplog, settings, gone):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in ({"max_new_tokens": 7} | settings).items():
        setattr(model.generation_config, name, value)
    with caplog.at_level(logging.WARNING, logger="wmtp"):
        make_savable(model, BytesTokenizer(), source=folder)
    said = caplog.messages[-1]
    assert str(folder) in said
    for name in gone:
        assert f"{name} = {settings[name]}" in said
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == 7
    assert not set(gone) & {name for name, value in saved.items() if value == settings.get(name)}


def test_what_may_be_written_stays_and_nothing_is_said(folder, caplog):
    ends = {"bos_token_id": 257, "eos_token_id": 256}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | ends))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6} | ends))
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model.generation_config.to_dict()
    make_savable(model, BytesTokenizer(), source=folder)
    assert model.generation_config.to_dict() == before
    assert not caplog.messages


def test_settings_of_generation_in_the_config_are_taken_out(folder, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.temperature = 0.6
    with caplog.at_level(logging.WARNING, logger="wmtp"):
        make_savable(model, source=folder)
    assert "config.json holds settings of generation" in caplog.messages[-1]
    assert "temperature = 0.6" in caplog.messages[-1]
    model.save_pretrained(tmp_path / "saved")


def test_what_cannot_be_repaired_is_an_error_at_opening(folder, monkeypatch):
    def refuse(self: GenerationConfig, *_: Any, **__: Any) -> None:
        raise ValueError("no `such_thing`")

    model = AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    with pytest.raises(WMTPError, match=r"base: its generation config cannot be saved: ValueError: no `such_thing`"):
        make_savable(model, source=folder)


def test_a_tokenizer_that_cannot_be_saved_is_an_error_at_opening(folder):
    class Broken(BytesTokenizer):
        def save(self, folder: Path) -> None:
            raise RuntimeError("no such luck")

    with pytest.raises(WMTPError, match="its tokenizer cannot be saved: RuntimeError: no such luck"):
        make_savable(AutoModelForCausalLM.from_pretrained(folder), Broken(), source=folder)


def test_a_model_saved_from_python_is_repaired_too(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    model = load_model(folder)
    model.base.generation_config.eos_token_id = 256
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()

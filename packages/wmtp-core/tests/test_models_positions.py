"""Scaled positions: how long a row may be, and when several documents may share one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.config.schema import Config, DataConfig, ModelConfig, TrainDataConfig
from wmtp.data.config import TextFiles
from wmtp.errors import ConfigError
from wmtp.models import load_model
from wmtp.models.config import HfModel
from wmtp.models.loaders.hf import HfLoader
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.tokenizers.config import Bytes
from wmtp.training.setup import open_source
from wmtp_algos import BaselineMTP

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def write(folder: Path, rope: dict[str, Any] | None) -> Path:
    rope = {"rope_type": "default"} if rope is None else rope
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    BytesTokenizer().save(folder / "base")
    (folder / "code").mkdir()
    (folder / "code" / "a.txt").write_text("x = 1")
    return folder / "base"


def config_of(base: Path, max_length: int, packing: bool) -> Config:
    return Config(
        models={"base": ModelConfig(loader=HfModel(uri=str(base)))},
        tokenizer=Bytes(),
        datasets={"code": TextFiles(uri=str(base.parent / "code"))},
        data=DataConfig(train=TrainDataConfig(max_length=max_length, batch_size=1, packing=packing)),
        trainer=BaselineMTP(),
    )


@pytest.mark.parametrize(
    ("rope", "longest"), [(None, 64), (YARN, 256), (YARN | {"factor": 1.0}, 64), (DYNAMIC, 128), (LLAMA3, 64), (LONG, 64)]
)
def test_a_row_is_as_long_as_the_scaling_is_for(tmp_path: Path, rope: dict[str, Any] | None, longest: int):
    base = write(tmp_path, rope)
    assert HfLoader().info(base).max_positions == longest
    assert load_model(base).max_positions == longest
    open_source(config_of(base, longest, packing=False))
    with pytest.raises(ConfigError, match=f"data.train.max_length: {longest + 1}, but the model has positions for {longest}"):
        open_source(config_of(base, longest + 1, packing=False))


@pytest.mark.parametrize(("rope", "switching"), [(DYNAMIC, 64), (LONG, 16)])
def test_packing_beyond_the_length_that_changes_a_row_is_refused(tmp_path: Path, rope: dict[str, Any], switching: int):
    config = config_of(write(tmp_path, rope), switching + 1, packing=True)
    with pytest.raises(
        ConfigError, match=rf"data\.train\.packing: the model scales its positions .* beyond {switching} tokens"
    ):
        open_source(config)
    shorter = attrs.evolve(config.data.train, max_length=switching)
    open_source(attrs.evolve(config, data=attrs.evolve(config.data, train=shorter)))


@pytest.mark.parametrize("rope", [None, YARN, LLAMA3])
def test_scaling_that_is_the_same_for_every_length_is_packed(tmp_path: Path, rope: dict[str, Any] | None):
    open_source(config_of(write(tmp_path, rope), 64, packing=True))

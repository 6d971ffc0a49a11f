"""The estimated speed against every run that docs/performance.md has measured with this project's trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from wmtp.config.load import load_config
from wmtp.config.schema import Config, HeadsConfig
from wmtp.models.base import ModelInfo
from wmtp.models.config import ScratchModel
from wmtp.training.speed import CARDS, describe_speed, step_seconds

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "layers": 16, "attention_heads": 32, "kv_heads": 8, "intermediate_size": 8192},
    "2.7B": {"hidden_size": 2560, "layers": 32, "attention_heads": 32, "kv_heads": 32, "intermediate_size": 6912},
    "7B": {"hidden_size": 4096, "layers": 32, "attention_heads": 32, "kv_heads": 32, "intermediate_size": 11008},
    "8 wide layers": {"hidden_size": 4096, "layers": 8, "attention_heads": 32, "kv_heads": 32, "intermediate_size": 11008},
    "SmolLM2": {"hidden_size": 576, "layers": 30, "attention_heads": 9, "kv_heads": 3, "intermediate_size": 1536},
}
HEADS = HeadsConfig(horizon=4)
#: of the text of bench/multi_gpu.py, whose rows were 92 % full: its tokens a second count no padding
PACKED = 0.92


def info(shape: str, vocab: int = 32_000) -> ModelInfo:
    return ScratchModel(vocab_size=vocab, max_positions=2048, **SHAPES[shape]).build().info(None)


def config(rows: int, length: int = 2048, devices: Mapping[str, Any] | None = None) -> Config:
    return load_config(
        {
            "models": {"base": {"type": "scratch", "vocab_size": 1024}},
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "python-source"}},
            "data": {"train": {"max_length": length, "batch_size": rows}},
            "trainer": {"type": "baseline-mtp"},
            "devices": {"precision": "bf16-params", "compile": True} | dict(devices or {}),
        }
    )


FULL = {"activation_checkpointing": "full"}


@pytest.mark.parametrize(
    ("card", "gpus", "shape", "vocab", "rows", "devices", "measured"),
    [
        ("H200", 1, "1B", 32_000, 16, {}, 60_765),
        ("H200", 1, "1B", 32_000, 16, {"activation_checkpointing": "selective"}, 60_313),
        ("H200", 1, "1B", 32_000, 16, FULL, 50_991),
        ("H200", 1, "1B", 32_000, 16, {"precision": "bf16"}, 59_003),
        ("H200", 1, "1B", 128_256, 16, {}, 41_071),
        ("H200", 1, "1B", 128_256, 16, {"activation_checkpointing": "selective"}, 40_173),
        ("H200", 1, "1B", 128_256, 16, FULL, 36_403),
        ("H200", 1, "1B", 128_256, 16, {"precision": "bf16"}, 40_191),
        ("H200", 1, "1B", 32_000, 16, {"precision": "fp8"}, 77_714),
        ("H200", 1, "1B", 32_000, 16, {"precision": "fp8", "activation_checkpointing": "selective"}, 75_077),
        ("H200", 1, "1B", 32_000, 16, {"precision": "fp8"} | FULL, 65_660),
        ("H200", 1, "1B", 128_256, 16, {"precision": "fp8"}, 49_591),
        ("H200", 1, "1B", 128_256, 16, {"precision": "fp8", "fp8": {"logits": "forward"}}, 53_088),
        ("H200", 1, "1B", 128_256, 16, {"precision": "fp8", "fp8": {"logits": "hidden-gradient"}}, 55_817),
        ("H200", 1, "8 wide layers", 32_000, 16, {"precision": "fp8"}, 48_553),
        ("H200", 1, "8 wide layers", 32_000, 8, {}, 34_186),
        ("H200", 1, "1B", 32_000, 8, {}, 58_512),
        ("H100", 1, "1B", 32_000, 8, {}, 44_314 / PACKED),
        ("H100", 2, "1B", 32_000, 16, {}, 87_951 / PACKED),
        ("H200", 1, "1B", 32_000, 8, {}, 51_808 / PACKED),
        ("H200", 2, "1B", 32_000, 16, {}, 93_986 / PACKED),
        ("H200", 4, "1B", 32_000, 32, {}, 189_840 / PACKED),
        ("H100", 2, "7B", 32_000, 8, FULL, 15_518),
        ("H200", 4, "7B", 32_000, 16, FULL, 30_709),
        ("H200", 1, "SmolLM2", 49_152, 32, {"compile": False}, 123_000),
    ],
)
def test_it_is_within_a_fifth_of_what_was_measured(
    card: str, gpus: int, shape: str, vocab: int, rows: int, devices: dict[str, Any], measured: float
) -> None:
    length = 1024 if shape == "SmolLM2" else 2048
    seconds = step_seconds(config(rows, length, devices), info(shape, vocab), HEADS, CARDS[card], world_size=gpus)
    assert rows * length / seconds == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(("card", "gpus", "measured"), [("H100", 2, 13_753), ("H200", 4, 26_156)])
def test_a_reference_model_costs_its_forward_pass(card: str, gpus: int, measured: float) -> None:
    rows, others = 4 * gpus, {"ref": info("2.7B")}
    seconds = step_seconds(config(rows, devices=FULL), info("7B"), HEADS, CARDS[card], world_size=gpus, others=others)
    assert rows * 2048 / seconds == pytest.approx(measured, rel=0.2)


def test_cards_and_hours_are_named() -> None:
    text = describe_speed(config(16), info("1B"), HEADS, steps=1000)
    assert text.startswith("H100 about 5")
    assert "; H200 about 6" in text
    assert "tokens/s, 9.1 min" in text
    assert "tokens/s, 1.5 h;" in describe_speed(config(16), info("1B"), HEADS, steps=10_000)
    assert "tokens/s, under a minute;" in describe_speed(config(16), info("1B"), HEADS, steps=10)
    assert "2 × A100 about" in describe_speed(config(16), info("1B"), HEADS, steps=None, world_size=2)
    assert "tokens/s;" in describe_speed(config(16), info("1B"), HEADS, steps=None)

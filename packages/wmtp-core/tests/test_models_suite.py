"""The loaders that read files pass the suite that plugin authors inherit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from wmtp.config.schema import HeadsConfig
from wmtp.models import MTPModel
from wmtp.models.config import HfModel, MetaMtpModel
from wmtp.testing import ModelLoaderTests


class TestHfLoader(ModelLoaderTests):
    config = HfModel(uri="model")

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        base = AutoModelForCausalLM.from_config(config).eval()
        MTPModel(base, HeadsConfig(horizon=2, kind="shared"), seed=0).save_pretrained(tmp_path / "model")
        return tmp_path / "model"


class TestMetaLoader(ModelLoaderTests):
    config = MetaMtpModel(uri="model")

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        params = {"dim": 16, "n_layers": 3, "n_heads": 2, "n_future_tokens": 2, "norm_eps": 1e-5}
        block = {f"attention.{name}": (16, 16) for name in ("wq", "wk", "wv", "wo")}
        block |= {"feed_forward.w1": (24, 16), "feed_forward.w2": (16, 24), "feed_forward.w3": (24, 16)}
        block |= {"attention_norm": (16,), "ffn_norm": (16,)}
        shapes = {"tok_embeddings": (31, 16), "output": (31, 16), "norm": (16,)}
        for group in ("layers.0", "layers.1", "extra_heads.0"):
            shapes |= {f"{group}.{part}": shape for part, shape in block.items()}
        (tmp_path / "params.json").write_text(json.dumps(params))
        torch.save({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "consolidated.pth")
        return tmp_path

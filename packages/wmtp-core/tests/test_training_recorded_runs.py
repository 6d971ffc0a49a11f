"""Whole runs with recorded passes: stages, micro-batches, several lengths, evaluation, checkpoints and a resume."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from spoiling import Spoiling

import wmtp
from wmtp.models import acceleration
from wmtp.models.config import ScratchModel
from wmtp.tokenizers.config import Bytes
from wmtp.training import recorded, run

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
CUDA = torch.cuda.is_available()
BASE = ScratchModel(vocab_size=258, hidden_size=64, layers=2, attention_heads=2, intermediate_size=96, max_positions=128)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model in files; without a GPU, what stands in for one."""
    if not CUDA:
        monkeypatch.setattr(run, "check_device", lambda *_: None)
        monkeypatch.setattr(recorded, "CudaGraphs", Spoiling)
        monkeypatch.setattr(acceleration, "compile_layers", lambda _: None)
    folder = tmp_path / "base"
    BASE.build().load(None, dtype=torch.float32, seed=1).model.save_pretrained(folder)
    Bytes().build(None).save(folder)
    return folder


def train(base, name, *, graphs, packing=False):
    """Train with and without graphs on the same data."""
    texts = base.parent / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(24):
        lines = "\n".join(f"    x = {number} + {k}" for k in range(number % 4))
        text = f'def f{number}(x):\n    """Adds."""\n{lines}\n    return x + {number}\n'
        (texts / f"{number}.py").write_text(text)
    return wmtp.run(
        {
            "run": {"output_dir": str(base.parent / "runs"), "name": name},
            "models": {
                "base": {"type": "hf", "uri": str(base), "quantize": "nf4", "lora": {"rank": 4}}
                | {"heads": {"horizon": 3, "warmup_steps": 3}}
            },
            "datasets": {
                "code": {"type": "python-source", "uri": str(texts)},
                "held-out": {"type": "python-source", "uri": str(texts)},
            },
            "data": {
                "train": {"max_length": 64, "batch_size": 6, "micro_batch_size": 2, "packing": packing},
                "eval": {"sources": ["held-out"]},
            },
            "trainer": {"type": "baseline-mtp"},
            "optimizer": {"type": "adamw", "lr": 3e-3},
            "train": {"max_steps": 10, "epochs": 100.0, "eval_interval": 4},
            "checkpoints": {"save_interval": 5},
            "tracker": {"type": "jsonl"},
            "devices": {"precision": "bf16-params", "compile": True, "cuda_graphs": graphs},
        }
    )


def losses(made):
    return [json.loads(line).get("loss") for line in (made.run_dir / "metrics.jsonl").read_text().splitlines()]


def learned(made):
    return {f"{f.name}: {k}": v for f in sorted(made.model.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.skipif(not CUDA, reason="needs a GPU"))])
def test_a_run_learns_what_it_learns_without_graphs(base, monkeypatch, packing):
    replays = []
    forward = recorded._Recording.replay_forward
    monkeypatch.setattr(recorded._Recording, "replay_forward", lambda self: replays.append(1) or forward(self))
    made, plain = (train(base, f"graphs-{graphs}", graphs=graphs, packing=packing) for graphs in (True, False))
    assert len(replays) >= 10
    close = {"rtol": 2e-2, "atol": 2e-3} if CUDA else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(losses(made), losses(plain), **close)
    tensors, expected = learned(made), learned(plain)
    assert tensors.keys() == expected.keys()
    if not CUDA:
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_a_resumed_run_goes_on_as_if_it_had_not_ended(base):
    made = train(base, "whole", graphs=True)
    before, expected = losses(made), learned(made)
    shutil.rmtree(made.run_dir / "checkpoints" / "step-10")
    shutil.rmtree(made.model)
    again = wmtp.run(resume=made.run_dir)
    close = {"rtol": 2e-2, "atol": 2e-3} if CUDA else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(losses(again), before, **close)
    tensors = learned(again)
    assert tensors.keys() == expected.keys()
    if not CUDA:
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)

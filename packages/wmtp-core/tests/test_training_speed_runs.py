"""Whole runs with the speed options: resumed as if never interrupted, and out of memory."""

import json
import math
import shutil

import pytest
import torch
from attrs import frozen
from safetensors.torch import load_file

import wmtp
from wmtp.errors import WMTPError
from wmtp.loss.torch_backend import plain
from wmtp.optim.config import AdamW
from wmtp.plugins.contract import TrainerConfig
from wmtp.trainers import Trainer
from wmtp.training import loop


def config(folder, **sections):
    (folder / "texts").mkdir(exist_ok=True)
    for number in range(6):
        (folder / "texts" / f"{number}.py").write_text(
            f'def f{number}(x):\n    """Adds {number}."""\n    return x + {number}\n'
        )
    return {
        "run": {"output_dir": str(folder / "runs"), "name": "one"},
        "models": {
            "base": {"type": "scratch", "vocab_size": 320, "hidden_size": 16, "layers": 2, "attention_heads": 2}
            | {"intermediate_size": 24, "max_positions": 64, "heads": {"horizon": 3}}
        },
        "tokenizer": {"type": "bytes"},
        "datasets": {"code": {"type": "python-source", "uri": str(folder / "texts")}},
        "data": {"train": {"max_length": 48, "batch_size": 4}},
        "trainer": {"type": "baseline-mtp"},
        "optimizer": {"type": "adamw", "lr": 1e-3},
        "train": {"max_steps": 4, "epochs": 100.0},
        "checkpoints": {"save_interval": 2, "keep_last": 0},
        "tracker": {"type": "jsonl"},
        "report": {"samples": 0},
        "devices": {"device": "cpu", "precision": "bf16-params", "activation_checkpointing": "selective"},
    } | sections


def model_tensors(checkpoint):
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


FP8 = {"precision": "fp8", "fp8": {"emulate": True, "min_features": 16, "exclude": ["extra_heads.1.*"]}}
FP8["fp8"]["logits"] = "hidden-gradient"


@pytest.mark.parametrize("precision", [{}, FP8], ids=["bf16", "fp8"])
def test_a_run_with_bf16_parameters_is_resumed_as_if_it_had_never_stopped(tmp_path, precision):
    if precision:
        pytest.importorskip("torchao")
    changed = config(tmp_path)
    changed["devices"] |= precision
    whole = wmtp.run(changed)
    expected, checkpoint = losses(whole.run_dir), model_tensors(whole.checkpoint)
    assert len(expected) == 4
    assert checkpoint
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.values()), "a checkpoint holds the fp32 copies"
    saved = load_file(whole.model / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved.values()), "model/ is what every forward pass computed with"
    for name, tensor in saved.items():
        assert torch.equal(tensor, checkpoint[f"base.{name}"].bfloat16()), name

    shutil.rmtree(whole.run_dir / "checkpoints" / "step-4")
    shutil.rmtree(whole.run_dir / "model")
    again = wmtp.run(changed, resume=whole.run_dir)
    assert losses(again.run_dir) == expected
    resumed = model_tensors(again.checkpoint)
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in resumed.items())


def test_a_run_in_fp8_trains_in_fp8_and_is_measured_in_bf16(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    seen = {"trained": set(), "measured": set()}
    rounded = []
    real_rounding = plain.in_fp8
    monkeypatch.setattr(plain, "in_fp8", lambda tensor: rounded.append(1) or real_rounding(tensor))

    def spy(owner, name, what, model_of):
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            seen[what] |= {type(module).__name__ for module in model_of(args[0]).modules()}
            before = len(rounded)
            result = real(*args, **kwargs)
            assert what == "trained" or len(rounded) == before, "logits in fp8 are for training"
            return result

        monkeypatch.setattr(owner, name, watched)

    spy(loop, "evaluate", "measured", lambda model: model)
    spy(loop.Fit, "_optimizer_step", "trained", lambda fit: fit.step_loss.model)
    changed = config(tmp_path, train={"max_steps": 2, "epochs": 100.0})
    changed["data"]["eval"] = {"holdout": 0.4}
    changed["devices"] |= FP8
    done = wmtp.run(changed)
    assert "Fp8Linear" in seen["trained"]
    assert rounded
    assert seen["measured"]
    assert "Fp8Linear" not in seen["measured"]
    again = wmtp.evaluate(done.run_dir, overrides=["eval=[{type='perplexity'}]"])
    assert again.numbers["perplexity/head_1"] == pytest.approx(math.exp(done.metrics["eval/loss/head_1"]), rel=1e-2)


class _Hungry(Trainer):
    def token_weights(self, view):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@frozen(kw_only=True)
class _HungryConfig(TrainerConfig):
    type = "hungry"

    def build(self):
        return _Hungry()


def test_a_run_out_of_memory_says_what_was_expected_and_what_helps(tmp_path):
    from attrs import evolve

    from wmtp.config.load import load_config

    with pytest.raises(WMTPError, match=r"cpu is out of memory: the estimate was about .*what helps most: .*\(about "):
        wmtp.run(evolve(load_config(config(tmp_path)), trainer=_HungryConfig(), optimizer=AdamW()))

"""The fastest setting on a GPU, whole runs: compiled, bf16 parameters, a tied embedding, packed rows, and stages.

Skipped where there is none. `test_training_compiled_stages.py` has the same question on a CPU, for single steps.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import wmtp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS, WARMUP = 8, 3


def train(folder, name, *, tied, compiled, precision):
    """The losses of a run with head warm-up, and the tensors of its model."""
    (folder / "texts").mkdir(exist_ok=True)
    for number in range(40):
        lines = "\n".join(f"    x = {number} + {k}" for k in range(number))
        (folder / "texts" / f"{number}.py").write_text(
            f'def f{number}(x):\n    """Adds."""\n{lines}\n    return x + {number}\n'
        )
    shape = {"vocab_size": 320, "hidden_size": 576, "layers": 3, "attention_heads": 9, "kv_heads": 3, "intermediate_size": 1536}
    run = wmtp.run(
        {
            "run": {"output_dir": str(folder / "runs"), "name": name},
            "models": {
                "base": {"type": "scratch", "tie_embeddings": tied, "max_positions": 512, **shape}
                | {"heads": {"horizon": 3, "warmup_steps": WARMUP}}
            },
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "python-source", "uri": str(folder / "texts")}},
            "data": {"train": {"max_length": 256, "batch_size": 8, "micro_batch_size": 4}},
            "trainer": {"type": "baseline-mtp"},
            "optimizer": {"type": "adamw", "lr": 3e-3},
            "train": {"max_steps": STEPS, "epochs": 100.0},
            "tracker": {"type": "jsonl"},
            "devices": {"device": "cuda", "precision": precision, "compile": compiled},
        }
    )
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], load_file(run.model / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-params"])
def test_a_compiled_run_learns_as_an_eager_one_from_stage_to_stage(tmp_path, precision, tied):
    torch._dynamo.reset()
    losses, model = train(tmp_path, "compiled", tied=tied, compiled=True, precision=precision)
    expected, eager = train(tmp_path, "eager", tied=tied, compiled=False, precision=precision)
    assert len(losses) == STEPS
    torch.testing.assert_close(losses, expected, rtol=1e-3 if precision == "fp32" else 5e-2, atol=0)
    assert losses[-1] < losses[WARMUP]
    assert model.keys() == eager.keys()
    norm = model["model.norm.weight"]
    assert not torch.equal(norm, torch.ones_like(norm)), "the final norm learns once the warm-up is over"

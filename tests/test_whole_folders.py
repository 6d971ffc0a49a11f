"""Runs whose base holds more than they train, or what transformers will not write: ``model/`` is whole again."""

import json

import kept_folders
import pytest
import torch
from crossings import sampled
from kept_folders import VISION
from native_folders import tensors_of
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from wmtp.tokenizers.bytes import BytesTokenizer

TEXT = kept_folders.TEXT | {"vocab_size": 258, "max_position_embeddings": 128}
SHORT = [word for name in ("models.base.heads", "schedule") for word in ("--set", f"{name}.warmup_steps=0")]
SHORT += ["--set", "train.max_steps=2"]
BASE = """
[models.base]
type = "hf"
uri = "{uri}"
[data.train]
packing = false
"""


def bytes_of(tensor):
    return tensor.dtype, tensor.contiguous().flatten().view(torch.uint8).tolist()


@pytest.fixture
def on_base(recipe, tmp_path):
    """Writes the recipe with another base, and returns its path."""

    def write(uri):
        text = recipe.read_text()
        start, end = text.index("[models.base]"), text.index("[models.base.heads]")
        base = BASE.format(uri=uri).replace("[data.train]\npacking = false\n", "")
        text = text[:start] + base + text[end:]
        path = tmp_path / f"{uri.name}.toml"
        # new heads are asked for by name: of the model's own layers there is a part
        text = text.replace("[models.base.heads]\n", '[models.base.heads]\nkind = "block"\n', 1)
        path.write_text(text.replace("[data.train]\n", "[data.train]\npacking = false\n", 1))
        return path

    return write


@pytest.fixture
def multimodal(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "base"
    Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=TEXT, vision_config=VISION)).bfloat16().save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.randn(32, 64).bfloat16()}, file, metadata={"format": "pt"})
    BytesTokenizer().save(folder)
    return folder


def assert_whole(folder, base):
    """All tensors of ``base`` are in ``folder``: what the text model does not have bit for bit, what it has trained."""
    old, new = tensors_of(base), tensors_of(folder)
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        if name.startswith(("model.visual.", "mtp.")):
            assert bytes_of(new[name]) == bytes_of(tensor), name
    assert any(not torch.equal(new[name].float(), tensor.float()) for name, tensor in old.items())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    assert config["text_config"]["mtp_num_hidden_layers"] == 1
    _, found = Qwen3_5ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found


@pytest.mark.parametrize(
    "how",
    sampled([((),), (("--set", 'devices.fsdp.strategy="grad-op"'),), (("--set", "launcher.processes=2"),)], 3),
)
def test_a_multimodal_base_is_whole_again_and_trains_again(on_base, multimodal, wmtp, tmp_path, how):
    (multimodal / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "max_new_tokens": 9})
    )
    settings = (*SHORT, *how)
    run = wmtp("run", on_base(multimodal), "--run-name", "first", *settings)
    assert run.returncode == 0, run.stderr
    first = tmp_path / "runs" / "first" / "model"
    assert_whole(first, multimodal)
    assert json.loads((first / "generation_config.json").read_text())["max_new_tokens"] == 9
    if how:
        return
    again = wmtp("run", on_base(first), "--run-name", "second", *settings)
    assert again.returncode == 0, again.stderr
    assert_whole(tmp_path / "runs" / "second" / "model", multimodal)
    exported = wmtp("export", tmp_path / "runs" / "second", tmp_path / "exported", "--format", "hf")
    assert exported.returncode == 0, exported.stderr
    assert_whole(tmp_path / "exported", multimodal)
    measured = wmtp("eval", tmp_path / "runs" / "second", "--set", 'eval=[{type="perplexity"}]')
    assert measured.returncode == 0, measured.stderr


def test_a_base_that_is_gone_at_a_resume_is_named(on_base, multimodal, wmtp, tmp_path):
    run = wmtp("run", on_base(multimodal), "--run-name", "one", *SHORT)
    assert run.returncode == 0, run.stderr
    multimodal.rename(tmp_path / "elsewhere")
    resumed = wmtp("run", "--resume", tmp_path / "runs" / "one")
    assert resumed.returncode != 0
    assert str(multimodal) in resumed.stderr
    assert "Traceback" not in resumed.stderr


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_a_base_that_would_lose_a_part_is_refused_before_training(on_base, multimodal, wmtp, how):
    config = json.loads((multimodal / "config.json").read_text())
    (multimodal / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3_5ForCausalLM"]}))
    done = wmtp("run", on_base(multimodal), *how)
    assert done.returncode == 2, done.stderr
    assert "models.base: " in done.stderr
    assert "model.visual.blocks.0.attn.proj.bias" in done.stderr


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_contrary_settings_of_generation_do_not_cost_the_model(on_base, wmtp, tmp_path, file):
    folder = tmp_path / "base"
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=258, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    BytesTokenizer().save(folder)
    content = json.loads((folder / file).read_text()) | {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (folder / file).write_text(json.dumps(content))
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    run = wmtp("run", on_base(folder), "--run-name", "one", *SHORT)
    assert run.returncode == 0, run.stderr
    assert "temperature = 0.6, top_p = 0.9" in run.stderr
    assert run.stderr.index("temperature = 0.6") < run.stderr.index("steps of 4 rows")
    assert (tmp_path / "runs" / "one" / "model" / "model.safetensors").is_file()

"""Model folders that cannot be opened or trained are refused by ``wmtp check``, which reads their small files alone."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import wmtp
from wmtp.errors import ConfigError, WMTPError
from wmtp.models import load_model
from wmtp.models.loaders.hf import HfLoader
from wmtp.storage.architectures import linear_maps
from wmtp.storage.model_files import check_folder

ENOUGH: dict[str, Any] = {
    "datasets": {"code": {"type": "jsonl", "uri": "s3://bucket/code"}},
    "trainer": {"type": "baseline-mtp"},
    "tracker": {"type": "jsonl"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def check(folder: Path, **options: object) -> None:
    wmtp.check({**ENOUGH, "models": {"base": {"type": "hf", "uri": str(folder), **options}}})


def refused(folder: Path, message: str, *, opened: bool = True) -> None:
    """``check`` says it, and so does whatever opens the folder without a config."""
    with pytest.raises(ConfigError, match=message):
        check(folder)
    if opened:
        for action in (HfLoader().info, load_model):
            with pytest.raises(WMTPError, match=message):
                action(folder)


def test_a_good_folder_is_nothing_to_complain_of_and_no_torch_is_imported(folder: Path):
    config = {**ENOUGH, "models": {"base": {"type": "hf", "uri": str(folder)}}}
    script = (
        "import json, sys, wmtp\n"
        "wmtp.check(json.loads(sys.argv[1]))\n"
        "assert not {'torch', 'transformers', 'safetensors'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}, "compressed-tensors"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"torch_dtype": "float8_e5m2", "dtype": None}, "float8_e5m2"),
    ],
)
def test_a_quantized_base(folder: Path, fields: dict[str, Any], method: str):
    change(folder, **fields)
    if fields.get("dtype", "") is None:
        content = json.loads((folder / "config.json").read_text())
        del content["dtype"]
        (folder / "config.json").write_text(json.dumps(content))
    refused(folder, rf"models\.base\.uri: .*base is quantized \({method}\).*bf16 or fp32", opened=False)


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_a_base_quantized_by_an_older_program(folder: Path, name: str, method: str):
    (folder / name).write_text("{}")
    refused(folder, rf"is quantized \({method}\)", opened=False)


def test_another_quantized_model_needs_its_package_only(folder: Path):
    change(folder, quantization_config={"quant_method": "gptq"})
    base = {"type": "scratch", "vocab_size": 64}
    config = {**ENOUGH, "models": {"base": base, "ref": {"type": "hf", "uri": str(folder)}}, "tokenizer": {"type": "bytes"}}
    with pytest.raises(ConfigError, match=r"models\.ref\.uri: .*quantized \(gptq\).*needs gptqmodel or auto_gptq"):
        wmtp.check(config)
    change(folder, quantization_config={"quant_method": "mxfp4"})
    wmtp.check(config)


def test_weights_in_fp8_without_a_word_of_it(folder: Path):
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for action in (HfLoader().info, load_model):
        with pytest.raises(WMTPError, match=r"holds weights in fp8 \(.*lm_head\.weight"):
            action(folder)


def test_adapters_that_cannot_be_opened(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "gone", "peft_type": "LORA", "r": 4, "lora_alpha": 8}'
    )
    refused(tmp_path, r"holds an adapter_config\.json and no adapter_model\.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gone", "peft_type": "IA3"}')
    refused(tmp_path, r"holds an adapter of type IA3, and WMTP opens LORA; merge it")


def test_an_adapter_beside_a_model_is_refused_too(folder: Path):
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds a model and an adapter")


def test_an_architecture_of_its_own_code(folder: Path):
    change(folder, model_type="chatglm", auto_map={"AutoConfig": "configuration_chatglm.ChatGLMConfig"})
    refused(folder, "no architecture 'chatglm'; its own code would have to run")


def test_own_code_for_a_known_architecture_is_left_alone(folder: Path):
    change(folder, auto_map={"AutoConfig": "configuration_llama.LlamaConfig"})
    check(folder)
    load_model(folder)


@pytest.mark.parametrize("layers", [10**7, 0, -1])
def test_a_number_of_layers_that_no_model_has(folder: Path, layers: int):
    change(folder, num_hidden_layers=layers)
    refused(folder, rf"num_hidden_layers = {layers}, and a model has 1 to 10,000")


def test_a_scratch_model_of_too_many_layers():
    base = {"type": "scratch", "vocab_size": 64, "layers": 10**7}
    with pytest.raises(ConfigError, match=r"models\.base\.layers"):
        wmtp.check({**ENOUGH, "models": {"base": base}, "tokenizer": {"type": "bytes"}})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str):
    if name != "adapter_config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    message = "holds a model and an adapter" if name == "adapter_config.json" else rf"{name}: is not a file"
    refused(folder, message)


@pytest.mark.parametrize("name", ["../base/x.safetensors", 3])
def test_a_shard_outside_of_the_folder(folder: Path, name: object):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, "weight_map places a in .*, which is not the name of a file in its folder")


def test_a_path_that_is_no_model(folder: Path):
    with pytest.raises(
        ConfigError, match=re.escape(f"model.safetensors is a file; name its folder, {folder}, or a .gguf file")
    ):
        check(folder / "model.safetensors")
    (folder / "config.json").rename(folder / "params.json")
    with pytest.raises(ConfigError, match='write type = "meta-mtp"'):
        check(folder)


@pytest.mark.parametrize("loader", ["hf", "meta-mtp"])
def test_a_data_file_is_no_model(tmp_path: Path, loader: str):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=re.escape(f"models.base.uri: {tmp_path / 'data.jsonl'} is a file; name ")):
        check(tmp_path / "data.jsonl", type=loader)


def test_conversations_for_a_model_without_a_chat_template(folder: Path):
    (folder / "tokenizer_config.json").write_text("{}")
    talk = folder.parent / "talk.jsonl"
    talk.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    config = {
        **ENOUGH,
        "models": {"base": {"type": "hf", "uri": str(folder)}},
        "datasets": {"talk": {"type": "chat", "uri": str(talk)}},
    }
    with pytest.raises(ConfigError, match=r"datasets.talk: holds conversations, and .* has no chat template"):
        wmtp.check(config)
    wmtp.check({**config, "data": {"train": {"chat_template": "{{ messages }}"}}})
    with pytest.raises(ConfigError, match=r"data.train.chat_template: 'a.*b' cannot be read \(embedded null byte\)"):
        wmtp.check({**config, "data": {"train": {"chat_template": "a\0b"}}})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    wmtp.check(config)


def test_targets_of_adapters_that_the_architecture_does_not_have(folder: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[models.base]\ntype = "hf"\nuri = "{folder}"\n[models.base.lora]\ntargets = [\n  "q_proj",\n  "q_prj",\n]\n'
        '[datasets.a]\ntype = "python-source"\n[trainer]\ntype = "baseline-mtp"\n'
    )
    with pytest.raises(ConfigError) as caught:
        wmtp.check(recipe)
    said = "models.base.lora.targets.1: 'q_prj' is no linear map of this model; did you mean 'q_proj'?"
    assert list(caught.value.problems) == [f"{recipe}:5: {said}"]
    good = ["q_proj", "self_attn.v_proj", "model.layers.0.mlp.down_proj"]
    check(folder, lora={"targets": good})
    with pytest.raises(ConfigError) as caught:
        check(folder, lora={"targets": [*good, "lm_head", "c_attn", ""]})
    there = "there are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert list(caught.value.problems) == [
        "models.base.lora.targets.3: 'lm_head' is the unembedding, which all heads share; it stays as it is: leave it out",
        f"models.base.lora.targets.4: 'c_attn' is no linear map of this model; {there}",
        f"models.base.lora.targets.5: '' is no linear map of this model; {there}",
    ]
    change(folder, tie_word_embeddings=True)
    with pytest.raises(
        ConfigError, match=r"'lm_head' is the unembedding, .* share \(and is the embedding too: they are tied\)"
    ):
        check(folder, lora={"targets": ["lm_head"]})
    change(folder, model_type="gpt2")
    check(folder, lora={"targets": ["c_attn"]})
    change(folder, model_type="fuyu", text_config={"model_type": "persimmon"})  # of two models: not known here
    check(folder, lora={"targets": ["dense"]})


def test_several_gguf_files(tmp_path: Path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))  # of no tensors
    refused(tmp_path, r"models\.base\.gguf_file: .* holds several: a\.gguf, b\.gguf")
    check(tmp_path, gguf_file="a.gguf")


def test_a_gguf_file_beside_safetensors_without_a_config(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, r"gguf_file: .* holds a\.gguf and model\.safetensors, without a config\.json")


def test_a_gguf_file_beside_a_config_alone_is_the_model(folder: Path):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "a.gguf").write_bytes(b"GGUF")
    assert HfLoader()._locate(folder) == (folder, "a.gguf")
    (folder.parent / "model.safetensors").rename(folder / "model.safetensors")
    assert HfLoader()._locate(folder) == (folder, None)


@pytest.mark.parametrize(("model_type", "is_known"), [("llamma", False), ("kosmos-2.5", True), ("qwen3_5_text", True)])
def test_an_unknown_model_type_is_said_before_transformers_is_imported(tmp_path, model_type, is_known):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if is_known:
        check_folder(tmp_path)
        return
    with pytest.raises(WMTPError, match=f"has no architecture '{model_type}'; correct model_type, or install a newer one"):
        check_folder(tmp_path)


def test_a_rank_above_every_width_is_seen_in_the_models_own_file(folder: Path):
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    check(folder, lora={"rank": width})
    with pytest.raises(ConfigError) as caught:
        check(folder, lora={"rank": width + 1})
    said = f"models.base.lora.rank: {width + 1}, but rank {width} holds every change of any map of this model; lower it"
    assert list(caught.value.problems) == [said]


def test_an_architecture_of_a_plugin_is_not_taken_for_one_with_the_begin_of_its_name(folder: Path, tmp_path: Path):
    change(folder, model_type="llama_mine")
    assert linear_maps({"model_type": "llama_mine"}) is None
    assert linear_maps({"model_type": "llama"}) is not None
    check(folder, lora={"targets": ["its_proj"]})


def test_an_architecture_that_a_plugin_has_registered_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    with pytest.raises(WMTPError, match="has no architecture 'mine'"):
        check_folder(tmp_path)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "mine", object)
    check_folder(tmp_path)


@pytest.mark.parametrize("fields", [{"max_position_embeddings": 16}, {"text_config": {"max_position_embeddings": 16}}])
def test_rows_longer_than_the_positions_of_a_model(folder: Path, fields: dict[str, Any]):
    change(folder, **fields)
    scratch = {"type": "scratch", "vocab_size": 258, "max_positions": 20}
    recipe = ENOUGH | {"models": {"base": {"type": "hf", "uri": str(folder)}, "ref": scratch}}
    recipe |= {"trainer": {"type": "rho1-wmtp"}, "data": {"train": {"max_length": 32}}}
    with pytest.raises(ConfigError) as caught:
        wmtp.check(recipe)
    said = "\n".join(caught.value.problems)
    assert "data.train.max_length: 32, but the model has positions for 16 tokens; write at most 16" in said
    assert "data.train.max_length: 32, but [models.ref] has positions for 20 tokens; write at most 20" in said


@pytest.mark.parametrize("by_layer", [False, True])
def test_positions_that_are_scaled_are_left_to_the_run(folder: Path, by_layer: bool):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    change(folder, max_position_embeddings=16, rope_parameters={"full_attention": yarn} if by_layer else yarn)
    recipe = ENOUGH | {"models": {"base": {"type": "hf", "uri": str(folder)}}, "data": {"train": {"max_length": 32}}}
    assert wmtp.check(recipe).config.data.train.max_length == 32

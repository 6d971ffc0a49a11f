"""Model folders: what is saved opens again bit for bit, and what is damaged is named."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError, FileError, WMTPError
from wmtp.models import MTPModel, build_model, load_model
from wmtp.models.config import HfModel
from wmtp.models.loaders.hf import HfLoader

VOCAB = 61
UP = "model.layers.1.mlp.up_proj.weight"


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on models this small a second thread only waits
    yield
    torch.set_num_threads(threads)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def all_logits(model: MTPModel) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(tokens())
        return [model.logits(output, head) for head in range(1, model.horizon + 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(path: Path, dtype: torch.dtype = torch.float32):
    return HfModel(uri=str(path)).build().load(path, dtype=dtype, seed=0)


class TestSaving:
    @pytest.mark.parametrize("kind", ["block", "linear", "residual", "chained", "shared"])
    @pytest.mark.parametrize("make", [llama, gpt2])
    def test_all_heads_come_back(self, tmp_path: Path, kind: str, make):
        model = MTPModel(make(), HeadsConfig(horizon=3, kind=kind, init="random"), seed=0)
        model.save_pretrained(tmp_path / "saved")
        again = load_model(tmp_path / "saved")
        assert (again.heads.kind, again.horizon) == (kind, 3)
        assert not again.training
        for mine, theirs in zip(all_logits(model), all_logits(again), strict=True):
            assert torch.equal(mine, theirs)
        if make is gpt2:
            assert again.base.lm_head.weight is again.base.transformer.wte.weight

    def test_bf16_stays_bf16(self, tmp_path: Path):
        model = MTPModel(llama(torch.bfloat16), HeadsConfig(horizon=2, init="random"), seed=0)
        model.save_pretrained(tmp_path)
        again = load_model(tmp_path)
        assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
        assert all(torch.equal(a, b) for a, b in zip(all_logits(model), all_logits(again), strict=True))

    @pytest.mark.parametrize("make", [llama, gpt2])
    def test_plain_transformers_opens_it(self, make: Callable[[], PreTrainedModel], tmp_path: Path):
        """In this process; ``tests/test_saved_models.py`` has the same of a process that never heard of wmtp."""
        model = MTPModel(make(), HeadsConfig(horizon=3, init="random"), seed=0)
        model.save_pretrained(tmp_path)
        again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(found.values()), found
        assert torch.equal(again(tokens()).logits, all_logits(model)[0])

    def test_a_plain_folder_has_one_head(self, folder: Path):
        model = load_model(folder)
        assert model.horizon == 1
        assert torch.equal(all_logits(model)[0], llama()(tokens()).logits)

    def test_a_saved_plain_model_is_a_plain_folder(self, tmp_path: Path):
        MTPModel(llama(), HeadsConfig(horizon=1), seed=0).save_pretrained(tmp_path)
        assert not [file for file in tmp_path.iterdir() if file.name.startswith("mtp_heads")]

    def test_a_disk_that_fills_up_is_an_error(self, tmp_path: Path):
        model = MTPModel(llama(), HeadsConfig(horizon=2), seed=0)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a file may not grow beyond this
        try:
            with pytest.raises(WMTPError, match="the model could not be written"):
                model.save_pretrained(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestHeadFiles:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        MTPModel(llama(), HeadsConfig(horizon=3), seed=0).save_pretrained(tmp_path)
        return tmp_path

    def test_missing_unexpected_and_misshapen_tensors_are_named(self, saved: Path):
        file = saved / "mtp_heads.safetensors"
        state = load_file(file)
        del state["1.self_attn.q_proj.weight"]
        state["0.mlp.up_proj.weight"] = torch.zeros(3, 3)
        state["other"] = torch.zeros(1)
        save_file(state, file)
        with pytest.raises(FileError) as caught:
            load_model(saved)
        for words in ("1.self_attn.q_proj.weight is missing", "0.mlp.up_proj.weight has shape [3, 3]", "other is unexpected"):
            assert words in str(caught.value)

    @pytest.mark.parametrize("gone", ["mtp_heads.safetensors", "mtp_heads.json"])
    def test_half_of_the_heads(self, saved: Path, gone: str):
        (saved / gone).unlink()
        with pytest.raises(WMTPError, match=f"{gone}: not there"):
            load_model(saved)

    def test_truncated_weights(self, saved: Path):
        file = saved / "mtp_heads.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(WMTPError, match=r"mtp_heads\.safetensors: not a whole safetensors file"):
            HfLoader().info(saved)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"format": 99, "kind": "block", "horizon": 3}, "format 99 is not known"),
            ({"format": 1, "kind": "wings", "horizon": 3}, "kind 'wings'"),
            ({"format": 1, "kind": "block", "horizon": "3"}, "horizon '3'"),
        ],
    )
    def test_a_description_that_makes_no_sense(self, saved: Path, content: dict, message: str):
        (saved / "mtp_heads.json").write_text(json.dumps(content))
        with pytest.raises(WMTPError, match=message):
            load_model(saved)


class TestHuggingFaceFolders:
    def test_info_reads_no_weights(self, folder: Path):
        info = HfLoader().info(folder)
        assert info.architecture == "LlamaForCausalLM"
        assert info.parameters == sum(parameter.numel() for parameter in llama().parameters())
        assert (info.layers, info.hidden_size, info.vocab_size, info.max_positions) == (2, 32, VOCAB, 64)
        assert info.heads is None

    def test_info_counts_tied_parameters_once_and_knows_the_heads(self, tmp_path: Path):
        MTPModel(gpt2(), HeadsConfig(horizon=3, kind="linear"), seed=0).save_pretrained(tmp_path)
        info = HfLoader().info(tmp_path)
        assert info.parameters == sum(parameter.numel() for parameter in gpt2().parameters())
        assert info.heads == HeadsConfig(horizon=3, kind="linear")

    def test_shards(self, tmp_path: Path):
        llama().save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert torch.equal(load(tmp_path).model(tokens()).logits, llama()(tokens()).logits)

    def test_a_shard_that_is_not_there(self, tmp_path: Path):
        llama().save_pretrained(tmp_path, max_shard_size="20KB")
        gone = sorted(tmp_path.glob("*.safetensors"))[1]
        gone.unlink()
        for action in (load, HfLoader().info):
            with pytest.raises(WMTPError, match=f"{gone.name}: not there"):
                action(tmp_path)

    def test_a_shard_without_a_tensor_of_the_index(self, tmp_path: Path):
        llama().save_pretrained(tmp_path, max_shard_size="20KB")
        shard = next(file for file in tmp_path.glob("*.safetensors") if UP in load_file(file))
        state = load_file(shard)
        del state[UP]
        save_file(state or {"x": torch.zeros(1)}, shard)
        with pytest.raises(WMTPError, match=f"{shard.name}: lacks the tensor {UP}"):
            load(tmp_path)

    def test_tensors_that_do_not_fit_are_all_named(self, folder: Path):
        state = load_file(folder / "model.safetensors")
        del state["model.norm.weight"]
        state[UP] = torch.zeros(3, 3)
        state["surplus.weight"] = torch.zeros(1)
        # old files hold this buffer, which follows from the config
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        save_file(state, folder / "model.safetensors")
        with pytest.raises(WMTPError) as caught:
            load(folder)
        message = str(caught.value)
        assert "model.norm.weight is missing" in message
        assert f"{UP} has shape [3, 3] in place of [48, 32]" in message
        assert "surplus.weight is unexpected" in message
        assert "inv_freq" not in message

    def test_a_missing_unembedding_is_no_tied_one(self, folder: Path):
        state = load_file(folder / "model.safetensors")
        del state["lm_head.weight"]
        save_file(state, folder / "model.safetensors")
        with pytest.raises(WMTPError, match=r"lm_head\.weight is missing"):
            load(folder)

    @pytest.mark.parametrize(
        "damage", [lambda b: b[:500], lambda b: b[:-20], lambda b: b"", lambda b: b"version https://git-lfs"]
    )
    def test_a_damaged_file(self, folder: Path, damage):
        file = folder / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        for action in (load, HfLoader().info):
            with pytest.raises(WMTPError, match=r"model\.safetensors: not a whole safetensors file"):
                action(folder)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{broken", "config.json: cannot be read as JSON"),
            ("[]", "config.json: holds no JSON object"),
            ("{}", "has no model_type"),
            (
                '{"model_type": "from-the-future"}',
                "no architecture 'from-the-future'; correct model_type, or install a newer one",
            ),
            ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}', "its own code would have to run"),
            ('{"model_type": "llama", "hidden_size": "wide"}', "transformers cannot open it: .*hidden_size"),
            ('{"model_type": "t5"}', "no decoder-only causal language model of the architecture 't5'"),
        ],
    )
    def test_a_config_that_does_not_help(self, folder: Path, content: str, message: str):
        (folder / "config.json").write_text(content)
        for action in (load, HfLoader().info):
            with pytest.raises(WMTPError, match=f"(?s){message}"):
                action(folder)

    def test_no_config_no_weights_no_folder(self, folder: Path, tmp_path: Path):
        with pytest.raises(WMTPError, match="nowhere: no such file or folder"):
            load(tmp_path / "nowhere")
        (folder / "model.safetensors").unlink()
        with pytest.raises(WMTPError, match="holds no weights"):
            load(folder)
        (folder / "config.json").unlink()
        with pytest.raises(WMTPError, match=r"config\.json: no such file"):
            load(folder)
        (folder / "notes.txt").write_text("x")
        with pytest.raises(WMTPError, match=r"notes\.txt: not a model folder and not a \.gguf file"):
            load(folder / "notes.txt")

    def test_pytorch_files_are_read_without_running_code(self, folder: Path):
        model = llama()
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        assert torch.equal(load(folder).model(tokens()).logits, model(tokens()).logits)

        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(folder / "broken-in"),))

        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
        with pytest.raises(
            WMTPError, match=r"its \.bin files hold more than tensors, and what a file holds is never run"
        ) as error:
            load(folder)
        assert "weights_only" not in str(error.value)
        assert not (folder / "broken-in").exists()

    def test_dtype(self, folder: Path):
        model = load(folder, torch.bfloat16).model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_attention_kernel(self, folder: Path):
        loaded = HfModel(uri="", attn_implementation="eager").build().load(folder, dtype=torch.float32, seed=0)
        assert loaded.model.config._attn_implementation == "eager"
        model = build_model(loaded, HeadsConfig(horizon=2), seed=0)
        assert model.packing.problem is None
        with pytest.raises(WMTPError, match="cannot open it"):
            HfModel(uri="", attn_implementation="telepathy").build().load(folder, dtype=torch.float32, seed=0)


class TestLinearHeadLayout:
    """The layout of distilgpt2-mtp."""

    def write(self, folder: Path, config: dict, *, tied: bool = True, as_bin: bool = False) -> tuple[PreTrainedModel, list]:
        base = gpt2()
        heads = [torch.randn(VOCAB, 32) for _ in range(3)]
        state = {f"base_model.{name}": tensor.clone() for name, tensor in base.state_dict().items()}
        if tied:
            del state["base_model.lm_head.weight"]
        state |= {f"extra_heads.{index}.weight": head for index, head in enumerate(heads)}
        folder.mkdir()
        if as_bin:
            torch.save(state, folder / "pytorch_model.bin")
        else:
            save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return base, heads

    @staticmethod
    def base_fields() -> dict:
        return {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

    @pytest.mark.parametrize("place", ["top", "nested", "inside-mtp", "tensors"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_it_is_read(self, tmp_path: Path, place: str, tied: bool):
        mtp: dict = {"n_future_tokens": 4}
        config = {
            "top": {**self.base_fields(), "mtp_config": mtp},
            "nested": {"model_type": "mtp", "base_config": self.base_fields(), "mtp_config": mtp},
            "inside-mtp": {"mtp_config": {**mtp, "base": self.base_fields()}},
            "tensors": {"model_type": "distilgpt2-mtp", "n_head": 4, "mtp_config": mtp},
        }[place]
        base, heads = self.write(tmp_path / "m", config, tied=tied, as_bin=place == "tensors")
        info = HfLoader().info(tmp_path / "m")
        assert info.heads == HeadsConfig(kind="linear", horizon=4)
        model = build_model(load(tmp_path / "m"), None, seed=0)
        logits = all_logits(model)
        assert torch.equal(logits[0], base(tokens()).logits)
        hidden = base.transformer(tokens()).last_hidden_state
        for mine, head in zip(logits[1:], heads, strict=True):
            assert torch.equal(mine, F.linear(hidden, head))

        model.save_pretrained(tmp_path / "saved")
        assert all(torch.equal(a, b) for a, b in zip(logits, all_logits(load_model(tmp_path / "saved")), strict=True))

    def test_another_number_of_heads_than_tensors(self, tmp_path: Path):
        self.write(tmp_path / "m", {**self.base_fields(), "mtp_config": {"n_future_tokens": 3}})
        with pytest.raises(FileError, match=r"n_future_tokens = 3 needs the tensors .* but there are .*extra_heads\.2\.weight"):
            load(tmp_path / "m")

    def test_no_number_of_heads(self, tmp_path: Path):
        self.write(tmp_path / "m", {**self.base_fields(), "mtp_config": {}})
        with pytest.raises(WMTPError, match=r"mtp_config\.n_future_tokens must be a whole number"):
            load(tmp_path / "m")

    def test_missing_and_misshapen_tensors_are_named(self, tmp_path: Path):
        self.write(tmp_path / "m", {**self.base_fields(), "mtp_config": {"n_future_tokens": 4}})
        file = tmp_path / "m" / "model.safetensors"
        state = load_file(file)
        del state["base_model.transformer.ln_f.weight"]
        save_file(state, file)
        with pytest.raises(WMTPError, match=r"transformer\.ln_f\.weight is missing"):
            load(tmp_path / "m")
        state["base_model.transformer.ln_f.weight"] = torch.ones(32)
        state["extra_heads.1.weight"] = torch.zeros(VOCAB + 1, 32)
        save_file(state, file)
        with pytest.raises(WMTPError, match=r"1\.weight has shape \[62, 32\] in place of \[61, 32\]"):
            build_model(load(tmp_path / "m"), None, seed=0)
        state["stray"] = torch.zeros(1)
        save_file(state, file)
        with pytest.raises(WMTPError, match=r"unexpected tensors, neither .*: stray"):
            load(tmp_path / "m")


def test_several_gguf_files_need_a_name(tmp_path: Path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"models\.base\.gguf_file: .* a\.gguf, b\.gguf"):
        load(tmp_path)
    with pytest.raises(WMTPError, match=r"c\.gguf: no such file"):
        HfLoader(gguf_file="c.gguf").info(tmp_path)

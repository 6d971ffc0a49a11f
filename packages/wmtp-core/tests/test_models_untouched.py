"""Model folders that hold more than is trained: written back bit for bit, or refused by name."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from kept_folders import MTP, add, assert_trained, change_config, config_of, text_folder, trained
from native_folders import tensors_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.exporting.meta import write_meta
from wmtp.models import MTPModel, build_model, load_model
from wmtp.models.base import LoadedModel
from wmtp.models.loaders.files import read_config
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.loaders.names import find_untouched


class TestQwenText:
    def test_mtp_layers_come_back_and_the_config_still_counts_them(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        add(folder, MTP)
        trained(folder).save_pretrained(tmp_path / "first")
        assert_trained(tensors_of(folder), tensors_of(tmp_path / "first"), set(MTP))
        assert config_of(tmp_path / "first")["mtp_num_hidden_layers"] == 1
        trained(tmp_path / "first").save_pretrained(tmp_path / "second")
        assert_trained(tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second"), set(MTP))
        _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "second", output_loading_info=True)
        assert not any(found.values()), found

    def test_layers_that_are_not_there_are_not_promised(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        trained(folder).save_pretrained(tmp_path / "saved")
        assert config_of(tmp_path / "saved")["mtp_num_hidden_layers"] == 0
        assert sorted(file.name for file in (tmp_path / "saved").glob("model*")) == ["model.safetensors"]

    def test_layers_that_are_partly_there_are_counted(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        change_config(folder, mtp_num_hidden_layers=3)
        add(folder, [*MTP, "mtp.layers.1.input_layernorm.weight"])
        trained(folder).save_pretrained(tmp_path / "saved")
        assert config_of(tmp_path / "saved")["mtp_num_hidden_layers"] == 2

    def test_shards_and_their_index(self, tmp_path: Path):
        folder = text_folder(tmp_path / "one")
        add(folder, MTP)
        trained(folder).base.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        shards = {file.name: set(load_file(file)) for file in (tmp_path / "shards").glob("model-*.safetensors")}
        assert len(shards) > 1
        old = tensors_of(tmp_path / "shards")
        trained(tmp_path / "shards").save_pretrained(tmp_path / "saved")
        assert {file.name: set(load_file(file)) for file in (tmp_path / "saved").glob("model*.safetensors")} == shards
        assert_trained(old, tensors_of(tmp_path / "saved"), set())
        index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
        assert index == json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())

    def test_bin_files(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        add(folder, MTP)
        old = tensors_of(folder)
        torch.save(old, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        trained(folder).save_pretrained(tmp_path / "saved")
        assert_trained(old, tensors_of(tmp_path / "saved"), set(MTP))

    def test_the_base_may_be_removed_before_the_model_is_saved(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        add(folder, MTP)
        old, model = tensors_of(folder), trained(folder)
        shutil.rmtree(folder)
        model.save_pretrained(tmp_path / "saved")
        assert_trained(old, tensors_of(tmp_path / "saved"), set(MTP))

    def test_a_base_that_is_written_to_meanwhile_is_an_error(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        add(folder, MTP)
        model = trained(folder)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
        with pytest.raises(WMTPError, match=r"model\.safetensors was written to since it was opened"):
            model.save_pretrained(tmp_path / "saved")

    def test_saving_over_the_base_is_refused_and_twice_elsewhere_is_not(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        add(folder, MTP)
        model = trained(folder)
        with pytest.raises(WMTPError, match="save into another folder"):
            model.save_pretrained(folder)
        for _ in range(2):
            model.save_pretrained(tmp_path / "saved")
        assert_trained(tensors_of(folder), tensors_of(tmp_path / "saved"), set(MTP))

    def test_what_transformers_does_not_ignore_is_still_refused(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        add(folder, ["model.adapter.weight"])
        for open_it in (HfLoader().info, trained):
            with pytest.raises(WMTPError, match=r"do not fit Qwen3_5ForCausalLM: model\.adapter\.weight is unexpected"):
                open_it(folder)

    def test_two_names_of_one_tensor_are_refused(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        add(folder, ["model.language_model.norm.weight"])
        with pytest.raises(WMTPError, match=r"norm\.weight and model\.\S*norm\.weight are both model\.norm\.weight"):
            HfLoader().info(folder)

    def test_a_quantized_folder_that_would_lose_tensors_is_refused(self, tmp_path: Path):
        folder = text_folder(tmp_path / "base")
        add(folder, MTP)
        change_config(folder, quantization_config={"quant_method": "fp8"})
        said = HfLoader().info(folder).unsavable
        assert said is not None
        assert "is quantized and has tensors that would be lost: mtp.fc.weight" in said


def deepseek(**options: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
        first_k_dense_replace=1,
        max_position_embeddings=64,
        **options,
    )
    return AutoModelForCausalLM.from_config(config)


BEHIND_THE_LAST = [
    "model.layers.2.eh_proj.weight",
    "model.layers.2.mlp.experts.0.gate_proj.weight",
    "model.layers.2.mlp.experts.0.up_proj.weight",
    "model.layers.2.shared_head.norm.weight",
]


class TestLayersBehindTheLast:
    def test_they_come_back_with_their_experts(self, tmp_path: Path):
        deepseek(num_nextn_predict_layers=1).save_pretrained(tmp_path / "base")
        add(tmp_path / "base", BEHIND_THE_LAST)
        trained(tmp_path / "base").save_pretrained(tmp_path / "saved")
        assert_trained(tensors_of(tmp_path / "base"), tensors_of(tmp_path / "saved"), set(BEHIND_THE_LAST))
        assert load_model(tmp_path / "saved").base.config.num_nextn_predict_layers == 1

    def test_very_many_are_found_in_little_time(self, tmp_path: Path):
        deepseek(num_nextn_predict_layers=1).save_pretrained(tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        count = 20_000  # DeepSeek-V3 has 90,000 tensors
        many = {f"model.layers.2.mlp.experts.{number}.gate_proj.scale": torch.zeros(1) for number in range(count)}
        save_file(load_file(file) | many, file, metadata={"format": "pt"})
        config = read_config(tmp_path / "base")
        begin = time.process_time()
        opening = find_untouched(tmp_path / "base", config)
        assert len(opening.untouched.tensors) == count
        assert time.process_time() - begin < 30

    def test_a_new_model_promises_none(self, tmp_path: Path):
        MTPModel(deepseek().eval(), HeadsConfig(horizon=1), seed=0).save_pretrained(tmp_path)
        assert config_of(tmp_path)["num_nextn_predict_layers"] == 0
        assert load_model(tmp_path).base.config.num_nextn_predict_layers == 0

    def test_where_the_config_promises_none_they_are_unexpected(self, tmp_path: Path):
        deepseek(num_nextn_predict_layers=0).save_pretrained(tmp_path / "base")
        add(tmp_path / "base", BEHIND_THE_LAST)
        with pytest.raises(WMTPError, match=r"model\.layers\.2\.eh_proj\.weight is unexpected"):
            HfLoader().info(tmp_path / "base")


class TestLlama:
    OLD = "model.layers.0.self_attn.rotary_emb.inv_freq"

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def test_the_frequencies_of_old_folders_come_back(self, folder: Path, tmp_path: Path):
        add(folder, [self.OLD])
        trained(folder).save_pretrained(tmp_path / "saved")
        assert_trained(tensors_of(folder), tensors_of(tmp_path / "saved"), {self.OLD})

    def test_metas_layout_takes_only_what_follows_from_the_config(self, folder: Path, tmp_path: Path):
        add(folder, [self.OLD])
        model = trained(folder)
        write_meta(model, tmp_path)
        assert model.untouched is not None
        model.untouched.tensors["mtp.fc.weight"] = model.untouched.tensors[self.OLD]  # type: ignore[index]
        with pytest.raises(ConfigError, match=r"no place for what its folder holds besides the model: mtp\.fc\.weight"):
            write_meta(model, tmp_path)

    def test_an_untied_copy_of_a_tied_unembedding_is_one_tensor(self, folder: Path, tmp_path: Path):
        tensors = tensors_of(folder)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        change_config(folder, tie_word_embeddings=True)
        model = trained(folder)
        assert model.base.lm_head.weight is model.base.model.embed_tokens.weight
        model.save_pretrained(tmp_path / "saved")
        again = load_model(tmp_path / "saved")
        assert torch.equal(again.base.lm_head.weight, tensors["lm_head.weight"] + 1)

    def test_a_loader_of_its_own_needs_to_say_nothing(self, folder: Path, tmp_path: Path):
        model = build_model(LoadedModel(model=LlamaForCausalLM.from_pretrained(folder)), None, seed=0)
        model.save_pretrained(tmp_path / "saved")
        assert tensors_of(tmp_path / "saved").keys() == tensors_of(folder).keys()

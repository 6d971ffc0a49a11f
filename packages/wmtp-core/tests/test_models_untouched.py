"""Model folders that hold more than is trained: written back bit for bit, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.exporting.command import export_model
from wmtp.exporting.meta import write_meta
from wmtp.models import MTPModel, build_model, load_model
from wmtp.models.base import LoadedModel
from wmtp.models.loaders.files import read_config
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.loaders.names import find_untouched
from wmtp.models.saving import make_savable

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 64,
    "mtp_num_hidden_layers": 1,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "num_position_embeddings": 16,
}
MTP = ["mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.input_layernorm.weight", "mtp.layers.0.self_attn.q_proj.weight"]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def add(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Put bf16 tensors of ``names`` into a folder of one file."""
    generator = torch.Generator().manual_seed(5)
    extra = {name: torch.randn(6, 4, generator=generator).to(torch.bfloat16) for name in names}
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return extra


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **fields: object) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | fields))


def text_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**TEXT)).save_pretrained(folder)
    return folder


def multimodal_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=TEXT, vision_config=VISION)
    Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    add(folder, MTP)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "none"}')
    return folder


def assert_used_but_not_trained(folder: Path, why: str) -> None:
    """The metadata say why, so that no run begins; the model opens, and is never saved in part."""
    said = HfLoader().info(folder).unsavable
    assert said is not None
    assert re.search(why, said), said
    with pytest.raises(WMTPError, match=why):
        load_model(folder).save_pretrained(folder.parent / "not_saved")
    assert not list((folder.parent / "not_saved").iterdir())


def trained(folder: Path) -> MTPModel:
    """Open a folder's model, with extra heads and every number 1 more than in the folder."""
    loaded = HfLoader().load(folder, dtype=torch.float32, seed=0)
    model = build_model(loaded, HeadsConfig(horizon=2, kind="block"), seed=0)
    with torch.no_grad():
        for tensor in {tensor.data_ptr(): tensor for tensor in model.base.state_dict().values()}.values():
            tensor.add_(1)
    return model


def assert_trained(old: dict[str, Tensor], new: dict[str, Tensor], kept: set[str]) -> None:
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        if name in kept:
            assert new[name].dtype == tensor.dtype
            assert torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8)), name
        else:
            assert torch.equal(new[name], tensor.float() + 1), name


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
        model = trained(folder)
        model.base.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        count = len(list((tmp_path / "shards").glob("model-*.safetensors")))
        assert count > 1
        assert model.untouched is not None
        model.untouched.write(tmp_path / "shards", model.base)
        index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) == count + 1
        assert index["weight_map"].keys() == tensors_of(folder).keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "shards").values())
        again = trained(tmp_path / "shards")
        assert again.untouched is not None
        assert set(again.untouched.tensors) == set(MTP)

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


class TestMultimodal:
    def test_the_folder_is_whole_again(self, tmp_path: Path):
        folder = multimodal_folder(tmp_path / "base")
        trained(folder).save_pretrained(tmp_path / "first")
        trained(tmp_path / "first").save_pretrained(tmp_path / "second")
        old = tensors_of(folder)
        kept = {name for name in old if name.startswith(("model.visual.", "mtp."))}
        assert len(kept) > len(MTP)
        assert_trained(old, tensors_of(tmp_path / "first"), kept)
        assert_trained(tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second"), kept)
        whole, found = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "first", output_loading_info=True)
        assert not any(found.values()), found
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, old[name].float() + (0 if name in kept else 1)), name
        before, after = config_of(folder), config_of(tmp_path / "first")
        assert (after["architectures"], after["vision_config"]) == (before["architectures"], before["vision_config"])
        assert after["text_config"] == before["text_config"] | {"dtype": "float32"}
        assert (tmp_path / "second" / "preprocessor_config.json").read_bytes() == b'{"image_processor_type": "none"}'

    def test_layers_that_are_not_there_are_promised_in_no_table(self, tmp_path: Path):
        folder = multimodal_folder(tmp_path / "base")
        tensors = {name: tensor for name, tensor in tensors_of(folder).items() if name not in MTP}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        text = config_of(folder)["text_config"]
        del text["model_type"]  # many a folder's table does not say it
        change_config(folder, text_config=text, mtp_num_hidden_layers=1)
        trained(folder).save_pretrained(tmp_path / "saved")
        after = config_of(tmp_path / "saved")
        assert (after["mtp_num_hidden_layers"], after["text_config"]["mtp_num_hidden_layers"]) == (0, 0)

    def test_settings_that_were_taken_out_do_not_come_back(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        folder = multimodal_folder(tmp_path / "base")
        text = config_of(folder)["text_config"] | {"temperature": 0.6}
        change_config(folder, text_config=text, top_p=0.9)
        with caplog.at_level("WARNING", logger="wmtp"):
            trained(folder).save_pretrained(tmp_path / "saved")
        assert {"top_p = 0.9", "temperature = 0.6"} == set(re.findall(r"\w+ = [\d.]+\d", caplog.messages[-1]))
        after = config_of(tmp_path / "saved")
        assert "top_p" not in after
        assert "temperature" not in after["text_config"]
        Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")

    def test_a_config_of_the_whole_that_cannot_be_saved_is_an_error_at_opening(self, tmp_path: Path, monkeypatch):
        def refuse(self: object, *_: object, **__: object) -> None:
            raise ValueError("no such thing")

        loaded = HfLoader().load(multimodal_folder(tmp_path / "base"), dtype=torch.float32, seed=0)
        monkeypatch.setattr(Qwen3_5Config, "save_pretrained", refuse)
        with pytest.raises(WMTPError, match=r"its config\.json cannot be saved: ValueError: no such thing"):
            make_savable(loaded.model, untouched=loaded.untouched)

    def test_export_to_hf_keeps_it_whole(self, tmp_path: Path):
        folder = multimodal_folder(tmp_path / "base")
        export_model(str(folder), tmp_path / "exported", format="hf")
        old, new = tensors_of(folder), tensors_of(tmp_path / "exported")
        assert old.keys() == new.keys()
        assert all(torch.equal(new[name], old[name]) for name in old)
        assert config_of(tmp_path / "exported")["model_type"] == "qwen3_5"

    def test_without_its_vision_tower_it_is_saved_as_the_text_model_that_it_is(self, tmp_path: Path):
        folder = multimodal_folder(tmp_path / "base")
        old = {name: tensor for name, tensor in tensors_of(folder).items() if "visual" not in name}
        save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
        trained(folder).save_pretrained(tmp_path / "saved")
        assert_trained(old, tensors_of(tmp_path / "saved"), set(MTP))
        after = config_of(tmp_path / "saved")
        assert (after["model_type"], after["architectures"]) == ("qwen3_5_text", ["Qwen3_5ForCausalLM"])
        assert "vision_config" not in after
        assert after["mtp_num_hidden_layers"] == 1

    def test_a_vision_tower_with_a_hole_is_refused(self, tmp_path: Path):
        folder = multimodal_folder(tmp_path / "base")
        tensors = tensors_of(folder)
        del tensors["model.visual.pos_embed.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert_used_but_not_trained(folder, r"Qwen3_5ForConditionalGeneration: model\.visual\.pos_embed\.weight is missing")

    def test_an_unknown_part_is_refused(self, tmp_path: Path):
        folder = multimodal_folder(tmp_path / "base")
        add(folder, ["model.visual.ear.weight"])  # transformers ignores whatever begins like that
        for open_it in (HfLoader().info, trained):
            with pytest.raises(WMTPError, match=r"model\.visual\.ear\.weight is unexpected"):
                open_it(folder)

    def test_a_llama_4_trains_its_text_part_and_keeps_the_rest(self, tmp_path: Path):
        """transformers opens the text model in it, and saves that under names of its own."""
        text = {name: value for name, value in TEXT.items() if not name.startswith(("linear", "mtp"))}
        text |= {"intermediate_size_mlp": 48, "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 8, "patch_size": 4, "projector_input_dim": 16, "projector_output_dim": 16}
        config = Llama4Config(text_config=text, vision_config=vision | {"vision_output_dim": 16})
        torch.manual_seed(0)
        Llama4ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
        assert HfLoader().info(tmp_path / "base").unsavable is None
        old = tensors_of(tmp_path / "base")
        rest = {name for name in old if not name.startswith("language_model.")}
        assert rest
        trained(tmp_path / "base").save_pretrained(tmp_path / "first")
        assert_trained(old, tensors_of(tmp_path / "first"), rest)
        trained(tmp_path / "first").save_pretrained(tmp_path / "second")
        assert_trained(tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second"), rest)
        _, found = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "second", output_loading_info=True)
        assert not any(found.values()), found
        assert config_of(tmp_path / "second")["model_type"] == "llama4"

    def test_a_config_without_an_architecture_for_all_of_it_is_refused(self, tmp_path: Path):
        folder = multimodal_folder(tmp_path / "base")
        change_config(folder, architectures=["Qwen3_5ForCausalLM"])
        assert_used_but_not_trained(folder, r"names no architecture of transformers for all of it \(Qwen3_5ForCausalLM\)")

    def test_gemma_opens_whole_and_is_saved_whole(self, tmp_path: Path):
        text = {name: value for name, value in TEXT.items() if not name.startswith(("linear", "mtp"))}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Gemma3Config(
            text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 4}, mm_tokens_per_image=4
        )
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
        load_model(tmp_path / "base").save_pretrained(tmp_path / "saved")
        old, new = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "saved")
        assert old.keys() == new.keys()
        assert all(torch.equal(new[name], old[name]) for name in old)
        assert (tmp_path / "saved" / "preprocessor_config.json").is_file()


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

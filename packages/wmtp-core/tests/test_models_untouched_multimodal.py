"""Multimodal folders: the text part is trained, the rest comes back bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from kept_folders import (
    MTP,
    TEXT,
    add,
    assert_trained,
    assert_used_but_not_trained,
    change_config,
    config_of,
    multimodal_folder,
    trained,
)
from native_folders import tensors_of
from safetensors.torch import save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from wmtp.errors import WMTPError
from wmtp.exporting.command import export_model
from wmtp.models import load_model
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.saving import make_savable


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

"""Model folders that contradict themselves or hold leftovers: refused by name, or read and written as transformers does."""

from __future__ import annotations

import copy
import errno
import json
import pickle
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.errors import WMTPError
from wmtp.models import MTPModel, load_model
from wmtp.models.loaders.files import weight_files
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.loaders.stored import stored_tensors
from wmtp.models.saving import make_savable

OLD = "model.layers.0.self_attn.rotary_emb.inv_freq"  # old folders hold it; it is kept, and not trained


def llama(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def as_bin(folder: Path, **options: bool) -> None:
    """Turn a folder of safetensors into one of ``.bin``, with a tensor that is kept and not trained."""
    tensors = load_file(folder / "model.safetensors") | {OLD: torch.ones(4)}
    torch.save(tensors, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def shard(folder: Path) -> tuple[Path, dict]:
    """Divide a folder; its index and what that holds."""
    (folder / "model.safetensors").unlink()
    llama().save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


def weights(model: PreTrainedModel) -> Tensor:
    return model.get_input_embeddings().weight


class TestIndex:
    @pytest.mark.parametrize("content", ["{}", "[]", "null", '{"weight_map": {"nowhere": "gone.safetensors"}}'])
    def test_one_beside_a_whole_file_is_not_read(self, folder: Path, content: str):
        (folder / "model.safetensors.index.json").write_text(content)
        assert weight_files(folder) == [folder / "model.safetensors"]
        assert torch.equal(weights(load_model(folder).base), weights(llama()))

    @pytest.mark.parametrize("name", [7, None, ["a"], {}, "", ".", "..", "../base/x.safetensors", "/etc/x", "a/b", "a\\b"])
    @pytest.mark.parametrize("of_bin", [False, True])
    def test_a_place_that_is_no_file_of_the_folder_is_named(self, folder: Path, name: object, of_bin: bool):
        index, content = shard(folder)
        content["weight_map"]["model.norm.weight"] = name
        if of_bin:
            index.unlink()
            index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps(content))
        for action in (HfLoader().info, load_model):
            with pytest.raises(WMTPError, match=rf"{index.name}: weight_map places model\.norm\.weight in .* not the name of"):
                action(folder)

    def test_a_tensor_in_two_shards_is_named(self, folder: Path):
        _, content = shard(folder)
        first, second = sorted(set(content["weight_map"].values()))[:2]
        name, value = next(iter(load_file(folder / first).items()))
        save_file(load_file(folder / second) | {name: value + 1}, folder / second)
        with pytest.raises(WMTPError, match=rf"{second}: {re.escape(name)} is in {first} too"):
            load_model(folder)

    def test_a_header_that_is_no_object_is_a_damaged_file(self, folder: Path):
        header = b"[1, 2]  "
        (folder / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
        for action in (HfLoader().info, load_model):
            with pytest.raises(WMTPError, match=r"x\.safetensors: not a whole safetensors file"):
                action(folder)


class TestBin:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_one_that_is_written_to_meanwhile_is_an_error(self, folder: Path, tmp_path: Path, zipped: bool):
        as_bin(folder, _use_new_zipfile_serialization=zipped)
        model = load_model(folder)
        file = folder / "pytorch_model.bin"
        with file.open("r+b") as out:
            out.seek(-1, 2)
            out.write(b"x")
        with pytest.raises(WMTPError, match=r"pytorch_model\.bin was written to since it was opened"):
            model.save_pretrained(tmp_path / "saved")

    def test_what_is_kept_comes_back(self, folder: Path, tmp_path: Path):
        as_bin(folder)
        model = load_model(folder)
        shutil.rmtree(folder)
        model.save_pretrained(tmp_path / "saved")
        files = sorted((tmp_path / "saved").glob("*.safetensors"))
        assert torch.equal(next(tensors[OLD] for file in files if OLD in (tensors := load_file(file))), torch.ones(4))


class TestCopies:
    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_of_a_model_keeps_what_its_folder_held(self, folder: Path, tmp_path: Path, form: str, copied):
        if form == "bin":
            as_bin(folder)
        else:
            file = folder / "model.safetensors"
            save_file(load_file(file) | {OLD: torch.ones(4)}, file, metadata={"format": "pt"})
        copied(load_model(folder)).save_pretrained(tmp_path / "saved")
        assert OLD in stored_tensors(weight_files(tmp_path / "saved"))

    def test_a_pickled_model_whose_folder_has_changed_is_not_saved(self, folder: Path, tmp_path: Path):
        file = folder / "model.safetensors"
        save_file(load_file(file) | {OLD: torch.ones(4)}, file, metadata={"format": "pt"})
        content = pickle.dumps(load_model(folder))
        save_file(load_file(file) | {OLD: torch.zeros(5)}, file, metadata={"format": "pt"})
        with pytest.raises(WMTPError, match="was written to since it was opened"):
            pickle.loads(content).save_pretrained(tmp_path / "saved")


class TestLeftovers:
    def test_shards_win_over_the_one_file_of_an_older_save(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        whole = LlamaForCausalLM.save_pretrained

        def in_shards(self: PreTrainedModel, *args: object, **options: object) -> None:
            whole(self, *args, max_shard_size="20KB", **options)  # type: ignore[arg-type]

        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", in_shards)
        MTPModel(llama(seed=1).eval(), HeadsConfig(horizon=1), seed=0).save_pretrained(folder)
        assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(folder)), weights(llama(seed=1)))
        assert not (folder / "model.safetensors").exists()

    def test_one_file_wins_over_the_index_of_an_older_save(self, folder: Path):
        index, _ = shard(folder)
        MTPModel(llama(seed=1).eval(), HeadsConfig(horizon=1), seed=0).save_pretrained(folder)
        assert not index.exists()
        assert torch.equal(weights(load_model(folder).base), weights(llama(seed=1)))

    def test_the_heads_of_an_older_save_are_no_heads_of_this_model(self, folder: Path):
        MTPModel(llama().eval(), HeadsConfig(horizon=3), seed=0).save_pretrained(folder)
        MTPModel(llama(seed=1).eval(), HeadsConfig(horizon=1), seed=0).save_pretrained(folder)
        assert load_model(folder).horizon == 1


class TestFullDisk:
    def test_without_a_place_for_temporary_files_nothing_is_blamed_on_the_model(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(WMTPError, match=r"temporary files: the model could not be written: .*TMPDIR"):
            make_savable(llama())

    def test_a_model_is_saved_without_a_place_for_temporary_files(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        MTPModel(llama().eval(), HeadsConfig(horizon=1), seed=0).save_pretrained(tmp_path / "saved")
        assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]

    def test_a_full_disk_is_not_the_configs_fault(self, tmp_path: Path, monkeypatch):
        def full(self: object, *_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(LlamaConfig, "save_pretrained", full)
        with pytest.raises(WMTPError, match=r"the model could not be written: \[Errno 28\] No space left"):
            make_savable(llama())

"""A model's own layers for multi-token prediction: opened as heads, and written back as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import native_folders as folders
import pytest
import torch
from kept_folders import VISION
from native_folders import LAYERS, NAMES, NAMING, VOCAB, copy_tables, tensors_of
from native_plain import plain_logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.models import MTPModel, build_model, load_model
from wmtp.models.loaders.hf import HfLoader


def ids_of(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def opened(folder: Path, heads: HeadsConfig | None = None, dtype: torch.dtype | None = None) -> MTPModel:
    loaded = HfLoader().load(folder, dtype=dtype, seed=0)
    if dtype == torch.float64:
        loaded.model.set_experts_implementation("eager")  # the others have no float64
    return build_model(loaded, heads, seed=0).eval()


@pytest.mark.parametrize("name", NAMES)
def test_head_logits_are_those_of_the_table(name: str, folder_of):
    folder = folder_of(name)
    model = opened(folder, HeadsConfig(horizon=4), torch.float64)
    assert model.heads.kind == "native"
    ids = ids_of()
    with torch.no_grad():
        output = model(ids)
        expected = plain_logits(name, folder, ids, 4)
    for head, logits in enumerate(expected, start=1):
        sure = ids.shape[1] - head + 1  # behind it, the row's beginning is read
        difference = (model.logits(output, head) - logits)[:, : sure - 1].abs().max()
        assert difference < 1e-5 * max(1.0, float(logits.abs().max())), (head, float(difference))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_comes_out_as_it_went_in(name: str, folder_of, tmp_path: Path):
    """In fp32; in bf16 and in shards: `test_models_shards`."""
    folder = folder_of(name)
    model = load_model(folder)
    modules = 2 if name in ("mimo_2", "deepseek_v3") else 1
    assert (model.heads.kind, model.horizon) == ("native", modules + 1)
    model.save_pretrained(tmp_path / "saved")
    model.save_base(tmp_path / "base")
    before = tensors_of(folder)
    for place in (tmp_path / "saved", tmp_path / "base"):
        after = tensors_of(place)
        assert after.keys() == before.keys()
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype, key
            assert torch.equal(after[key], tensor), key
        old, new = (json.loads((at / "config.json").read_text()) for at in (folder, place))
        assert {key: new.get(key) for key in ("model_type", "architectures")} == {
            key: old[key] for key in ("model_type", "architectures")
        }
    assert (tmp_path / "saved" / "configuration_mimo.py").exists() == name.startswith("mimo")
    again, ids = load_model(tmp_path / "saved"), ids_of()
    assert all(torch.equal(a, b) for a, b in zip(model(ids).hidden, again(ids).hidden, strict=True))


def test_trained_heads_and_their_horizon_come_back(folder_of, tmp_path: Path):
    model = opened(folder_of("glm4_moe"), HeadsConfig(horizon=3, trunk_gradient="detach"))
    with torch.no_grad():
        for parameter in model.extra_heads.parameters():
            parameter.add_(0.5)
    model.save_pretrained(tmp_path / "saved")
    again, ids = load_model(tmp_path / "saved"), ids_of()
    assert (again.heads.kind, again.horizon) == ("native", 3)
    assert all(torch.equal(a, b) for a, b in zip(model(ids).hidden, again(ids).hidden, strict=True))
    before, after = tensors_of(folder_of("glm4_moe")), tensors_of(tmp_path / "saved")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    begin, _ = NAMING["glm4_moe"](0)
    # a router's correction is a buffer, which no gradient trains
    assert changed == {name for name in before if name.startswith(begin) and "e_score" not in name}


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_tables_that_are_copies_are_the_models_own_and_are_written_again(name: str, folder_of, tmp_path: Path, caplog):
    """vLLM puts the model's in their place, so what they learned apart would be lost."""
    model = load_model(folder_of(name))
    assert "vLLM puts the model's in its place" in caplog.text
    assert any(isinstance(part, torch.nn.Embedding) for part in model.extra_heads)
    folder = shutil.copytree(folder_of(name).parent, tmp_path / "made") / "model"
    copies = copy_tables(folder)
    tensors = tensors_of(folder)
    assert len(copies) == 2 * model.horizon - 2
    model, ids = load_model(folder), ids_of()
    assert not any(isinstance(part, torch.nn.Embedding | torch.nn.Linear) for part in model.extra_heads)
    with torch.no_grad():
        expected = plain_logits(name, folder, ids, 3)
        found = opened(folder, HeadsConfig(horizon=3), torch.float64)
        sure = ids.shape[1] - 3
        assert (found.logits(found(ids), 2) - expected[1])[:, :sure].abs().max() < 1e-5 * float(expected[1].abs().max())
        model.anatomy.embedding.weight.mul_(0.5)
        model.anatomy.output.weight.mul_(2.0)
    model.save_pretrained(tmp_path / "saved")
    after = tensors_of(tmp_path / "saved")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], after[own]) for key, own in copies.items())
    assert torch.equal(after["lm_head.weight"], 2.0 * tensors["lm_head.weight"])
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model(ids).hidden, again(ids).hidden, strict=True))


def test_a_tokens_experts_are_written_one_by_one(folder_of, tmp_path: Path):
    load_model(folder_of("deepseek_v3")).save_pretrained(tmp_path / "saved")
    names = [name for name in tensors_of(tmp_path / "saved") if name.startswith(f"model.layers.{LAYERS}.mlp.experts.")]
    assert len(names) == 12 * 3


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3"])
def test_gradients_go_to_the_heads_and_where_joint_says(name: str, joint: bool, folder_of):
    heads = HeadsConfig(horizon=3, trunk_gradient="joint" if joint else "detach")
    model = opened(folder_of(name), heads, torch.float32)
    output = model(ids_of())
    sum(model.logits(output, head).square().mean() for head in (2, 3)).backward()
    assert all(parameter.grad is not None for parameter in model.extra_heads.parameters() if parameter.requires_grad)
    assert any(parameter.grad is not None for parameter in model.base.parameters()) == joint


@pytest.mark.parametrize("name", ["qwen3_5", "mimo", "glm4_moe", "exaone"])
def test_documents_in_one_row_are_as_if_alone(name: str, folder_of):
    model = opened(folder_of(name), HeadsConfig(horizon=3))
    documents = [ids_of(1, length) for length in (4, 5, 7)]
    row = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with torch.no_grad():
        packed, start = model(row, positions, True), 0
        for document in documents:
            alone = model(document)
            for head, (one, other) in enumerate(zip(packed.hidden, alone.hidden, strict=True)):
                sure = document.shape[1] - head  # beyond, the next document's tokens are read
                torch.testing.assert_close(one[:, start : start + sure], other[:, :sure], rtol=1e-4, atol=1e-5)
            start += document.shape[1]


class TestKinds:
    def test_a_config_that_names_no_kind_gets_the_models_own(self, folder_of):
        assert opened(folder_of("mimo"), HeadsConfig(horizon=2)).heads.kind == "native"

    def test_another_kind_leaves_them_as_they_are(self, folder_of, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level("INFO", "wmtp"):
            model = opened(folder_of("qwen3_5"), HeadsConfig(horizon=2, kind="block"))
        assert "own layers for multi-token prediction stay as they are: the heads are of kind 'block'" in caplog.text
        model.save_pretrained(tmp_path / "saved")
        before, after = tensors_of(folder_of("qwen3_5")), tensors_of(tmp_path / "saved")
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert load_model(tmp_path / "saved").heads.kind == "block"

    def test_horizon_1_leaves_them_as_they_are_and_says_so(self, folder_of, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level("INFO", "wmtp"):
            opened(folder_of("glm4_moe"), HeadsConfig(horizon=1)).save_pretrained(tmp_path / "saved")
        assert "stay as they are: horizon = 1" in caplog.text
        before, after = tensors_of(folder_of("glm4_moe")), tensors_of(tmp_path / "saved")
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_a_model_without_any_has_no_native_heads(self, tmp_path: Path):
        model = folders.base_of("glm4_moe")
        model.config.num_nextn_predict_layers = 0
        model.save_pretrained(tmp_path / "plain")
        with pytest.raises(ConfigError, match=r"models\.base\.heads\.kind: 'native' are the model's own"):
            opened(tmp_path / "plain", HeadsConfig(horizon=2, kind="native"))

    def test_init_has_no_effect_on_them(self, folder_of):
        with pytest.raises(ConfigError, match=r"heads\.init: 'random' has no effect"):
            opened(folder_of("mimo"), HeadsConfig(horizon=2, init="random"))


class TestDamagedFolders:
    """Refused by name where heads are wanted; the model alone can still be used, and keeps what there is."""

    def changed(self, folder_of, tmp_path: Path, name: str, change) -> Path:
        source, folder = folder_of(name), tmp_path / "changed"
        folder.mkdir()
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(source / "model.safetensors")
        change(tensors, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def refused(self, folder: Path, why: str) -> None:
        for heads in (HeadsConfig(horizon=2), HeadsConfig(horizon=2, kind="native")):
            with pytest.raises(ConfigError, match=why) as caught:
                opened(folder, heads)
            assert 'kind = "shared"' in str(caught.value)
        assert opened(folder, HeadsConfig(horizon=2, kind="linear")).horizon == 2
        assert load_model(folder).horizon == 1

    def test_a_missing_tensor(self, folder_of, tmp_path: Path):
        folder = self.changed(folder_of, tmp_path, "qwen3_5", lambda tensors, _: tensors.pop("mtp.fc.weight"))
        self.refused(folder, r"mtp\.fc\.weight is missing")

    def test_a_tensor_of_another_shape(self, folder_of, tmp_path: Path):
        def change(tensors, _):
            tensors["model.mtp_layers.0.mlp.up_proj.weight"] = torch.zeros(5, 5)

        self.refused(
            self.changed(folder_of, tmp_path, "mimo", change),
            r"up_proj\.weight has shape \[5, 5\] in place of \[48, 32\]",
        )

    def test_a_quantized_tensor(self, folder_of, tmp_path: Path):
        def change(tensors, _):
            name = f"model.layers.{LAYERS}.eh_proj.weight"
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

        folder = self.changed(folder_of, tmp_path, "glm4_moe", change)
        self.refused(folder, r"eh_proj\.weight is quantized \(F8_E4M3\)")

    def test_a_config_that_promises_more_modules(self, folder_of, tmp_path: Path):
        def change(_, folder):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 2}))

        folder = self.changed(folder_of, tmp_path, "mimo", change)
        self.refused(folder, r"config\.json says num_nextn_predict_layers = 2, and the folder holds 1")

    def test_a_window_that_the_models_first_layer_has_not(self, folder_of, tmp_path: Path):
        """K-EXAONE 2.0 may say so; no download mends it."""

        def change(_, folder):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"mtp_sliding_windows": [8]}))

        folder = self.changed(folder_of, tmp_path, "exaone", change)
        self.refused(
            folder, r"mtp_sliding_windows = 8, and the model's first layer, as which it is called, has 4; name another"
        )

    def test_two_layouts_at_once(self, folder_of, tmp_path: Path):
        def change(tensors, _):
            tensors["model.mtp_layers.0.input_proj.weight"] = torch.zeros(32, 64)

        folder = self.changed(folder_of, tmp_path, "qwen3_5", change)
        self.refused(folder, r"several layouts, 'qwen' \(mtp\..*\) and 'mimo'")

    def test_a_config_that_promises_layers_that_are_all_missing(self, folder_of, tmp_path: Path, caplog):
        def change(tensors, _):
            for name in [name for name in tensors if name.startswith("mtp.")]:
                del tensors[name]

        folder = self.changed(folder_of, tmp_path, "qwen3_5", change)
        self.refused(folder, r"config\.json says mtp_num_hidden_layers = 1, and the folder holds none of them; fetch")
        assert "are not opened, and stay as they are: config.json says mtp_num_hidden_layers = 1" in caplog.text
        model = opened(folder, HeadsConfig(horizon=2, kind="block"))
        model.save_pretrained(tmp_path / "saved")
        assert '"mtp_num_hidden_layers": 0' in (tmp_path / "saved" / "config.json").read_text()  # a number, and not false
        caplog.clear()
        load_model(tmp_path / "saved")
        load_model(folder_of("qwen3_5"))
        assert "config.json says" not in caplog.text

    def test_all_of_a_layer_is_missing_and_its_norms_are_there(self, folder_of, tmp_path: Path):
        """As above, and not new heads in silence."""

        def change(tensors, _):
            for name in [name for name in tensors if name.startswith("mtp.layers")]:
                del tensors[name]

        self.refused(self.changed(folder_of, tmp_path, "qwen3_5", change), r"mtp\.layers\.0\..* is missing")

    def test_the_first_of_two_modules_is_missing(self, folder_of, tmp_path: Path):
        def change(tensors, _):
            for name in [name for name in tensors if name.startswith("model.mtp_layers.0")]:
                del tensors[name]

        self.refused(self.changed(folder_of, tmp_path, "mimo_2", change), r"num_nextn_predict_layers = 2, and the folder")


def test_a_multimodal_folder_is_whole_again_and_its_own_layer_is_trained(folder_of, tmp_path: Path):
    """As Qwen3.5 is published: the text model under ``model.language_model``, the layer beside it, and a vision tower."""
    text = tensors_of(folder_of("qwen3_5"))
    config = Qwen3_5Config(text_config=folders.MODELS["qwen3_5"][1], vision_config=VISION)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    renamed = {name.replace("model.", "model.language_model.", 1): value for name, value in text.items() if "mtp." not in name}
    mtp = {name: value for name, value in text.items() if name.startswith("mtp.")}
    save_file(load_file(file) | renamed | mtp, file, metadata={"format": "pt"})
    model, alone, ids = load_model(tmp_path / "base"), load_model(folder_of("qwen3_5")), ids_of()
    assert (model.heads.kind, model.horizon) == ("native", 2)
    assert all(torch.equal(a, b) for a, b in zip(model(ids).hidden, alone(ids).hidden, strict=True))
    with torch.no_grad():
        model.extra_heads[0].projection.weight.add_(1)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == {"mtp.fc.weight"}
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == ["Qwen3_5ForConditionalGeneration"]


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_modules_compute_as_transformers_own(name: str, folder_of):
    """``MtpLayer`` of transformers, with the tensors of the folder under its names."""
    from transformers.modeling_layers import MtpLayer

    model = opened(folder_of(name), HeadsConfig(horizon=2), torch.float32)
    block, layers = model.extra_heads[0], model.base.model.layers
    theirs = MtpLayer(model.base.config, type(layers[-1]), type(model.base.model.norm), LAYERS - 1).eval()
    names = {"hidden_norm": "hnorm", "embedding_norm": "enorm", "projection": "eh_proj", "layer": "mtp_block"}
    names["output_norm"] = "post_norm"
    state = {}
    for key, value in block.state_dict().items():
        part, _, rest = key.partition(".")
        state[f"{names[part]}.{rest}"] = value
    theirs.load_state_dict(state)
    ids, places = ids_of(), torch.arange(9)[None]
    mask = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        output = model(ids)
        embedded = next(head for head in model.extra_heads if isinstance(head, nn.Embedding))(ids.roll(-1, 1))
        embedded[:, 0] = 0  # which vLLM does, and transformers does not
        around = model.base.model.rotary_emb(embedded, places)
        expected = theirs(embedded, output.hidden[0], around, mask, places, None)
    torch.testing.assert_close(output.hidden[1], expected, rtol=1e-4, atol=1e-5)

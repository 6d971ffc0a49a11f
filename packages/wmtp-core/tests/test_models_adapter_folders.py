"""Adapters in folders: written, opened by peft and here, merged, resumed, refused."""

import json
from functools import partial

import pytest
import torch
from adapted import IDS, make
from attrs import evolve
from native_folders import native_folder
from one_step import SMALL
from tiny_recipe import tiny_recipe

import wmtp
from wmtp.checkpoints.local import Checkpoint, load_checkpoint, save_checkpoint
from wmtp.cli import main
from wmtp.config.schema import HeadsConfig, LoraConfig, StorageConfig
from wmtp.errors import ConfigError, FileError, WMTPError
from wmtp.models import adapter_folder
from wmtp.models.adapter_folder import name_base
from wmtp.models.adapters import adapter_off
from wmtp.models.build import build_model, merge_brought
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.opening import load_model, saved_precision
from wmtp.optim.config import AdamW
from wmtp.optim.master_weights import MasterWeights
from wmtp.tokenizers.config import Bytes

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("heads", ["full", "adapters"])
def test_only_what_learns_has_a_copy_in_fp32_and_is_in_a_checkpoint(base, tmp_path, heads):
    from safetensors import safe_open

    lora = LoraConfig(rank=2, heads=heads)
    model = make(base, lora=lora, init="copy")
    for parameter in model.fixed_parameters():
        parameter.data = parameter.data.bfloat16()
    masters = MasterWeights(model, fixed=model.fixed_parameters())
    fixed = {id(p) for p in model.fixed_parameters()}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in fixed]
    copies = masters.replace([p for _, p in named])
    assert len(masters._masters) == len(named)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in copies} == {torch.float32}
    optimizer = AdamW(lr=1e-3).build(list(zip([name for name, _ in named], copies, strict=True)))
    with masters.in_place():
        save_checkpoint(tmp_path, 1, model, optimizer, {})
    (file,) = (tmp_path / "step-1").glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        assert set(tensors.keys()) == {f"model.{name}" for name, _ in named}
        expected = {name: tensors.get_tensor(f"model.{name}") for name, _ in named}
    other = make(base, lora=lora, init="copy", moved=False)
    learned = dict(other.named_parameters())
    optimizer = AdamW(lr=1e-3).build([(name, learned[name]) for name, _ in named])
    load_checkpoint(Checkpoint(path=tmp_path / "step-1", step=1), other, optimizer)
    assert all(torch.equal(learned[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "lora",
    [{}, {"dora": True}, {"rslora": True, "targets": ("v_proj",)}, {"heads": "adapters", "dora": True}],
    ids=["lora", "dora", "rslora", "heads"],
)
def test_peft_opens_what_is_saved_and_so_does_wmtp(base, tmp_path, lora):
    from transformers import AutoModelForCausalLM

    model = make(base, lora=LoraConfig(rank=2, **lora), init="copy")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again, opened = load_model(tmp_path), peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(IDS)
        logits = model.logits(expected, 1)
        torch.testing.assert_close(opened(input_ids=IDS).logits, logits)  # peft adds up in two steps
        assert all(torch.equal(left, right) for left, right in zip(again(IDS).hidden, expected.hidden, strict=True))
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=IDS).logits
        assert (plain - logits).abs().max() > 1e-3
        with adapter_off(again):
            assert torch.equal(again.logits(again(IDS), 1), plain)
        assert torch.equal(again.logits(again(IDS), 1), logits), "the adapter is on again"
        again.merge_adapter()
        torch.testing.assert_close(again(IDS).hidden, expected.hidden)
    assert {type(module).__module__.split(".")[0] for module in again.modules()} <= {"torch", "transformers", "wmtp"}
    again.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=IDS).logits
        assert torch.equal(plain, again.logits(again(IDS), 1))


def test_bf16_parameters_are_opened_as_they_were_saved(base, tmp_path):
    model = make(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert saved_precision(tmp_path) == "bf16-params"
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again(IDS).hidden[2], model(IDS).hidden[2])


def test_an_adapter_that_peft_wrote_goes_on_or_is_merged(base, tmp_path):
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.1
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).eval()
    theirs.save_pretrained(tmp_path)
    logits = theirs(input_ids=IDS).logits
    wanted = LoraConfig(rank=2, alpha=4.0, targets=("v_proj", "q_proj"))
    model = build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), HeadsConfig(horizon=2), 0, lora=wanted)
    assert torch.equal(model.logits(model(IDS), 1), logits)
    merged = build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), None, 0)
    merge_brought(merged)
    assert merged.adapter is None
    assert all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged.logits(merged(IDS), 1), logits)
    with pytest.raises(ConfigError) as error:
        build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), None, 0, lora=LoraConfig(rank=3, dora=True))
    found = [problem.split(":")[0] for problem in error.value.problems]
    assert found == [f"models.base.lora.{key}" for key in ("rank", "alpha", "dora", "targets")]


def test_an_adapter_of_peft_goes_on_in_the_bits_that_the_config_names(base, tmp_path):
    """PEFT's files do not tell in how many it has learned."""
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "theirs")
    lora = LoraConfig(rank=2, targets=("q_proj",))
    for quantize in ("nf4", None):
        loaded = HfLoader().load(tmp_path / "theirs", dtype=torch.float32, seed=0)
        model = build_model(loaded, None, 0, lora=lora, quantize=quantize)
        assert model.adapter.quantize == quantize


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    base, theirs = tmp_path / "base", tmp_path / "theirs"
    evolve(SMALL, vocab_size=258).build().load(None, dtype=torch.float32, seed=1).model.save_pretrained(base)
    Bytes().build(None).save(base)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(theirs)
    with caplog.at_level("INFO", "wmtp"):
        assert len(load_model(theirs).generate("def f", max_new_tokens=3).tokens) == 3
    assert f"{theirs} holds no tokenizer: that of its base is used, {base.resolve()}" in caplog.text
    (tmp_path / "code.jsonl").write_text('{"text": "a = 1"}\n' * 4)
    model = {"type": "hf", "uri": str(theirs), "lora": {"rank": 2, "targets": ["q_proj"]}}
    recipe = tiny_recipe(str(tmp_path / "code.jsonl"), models={"base": model}, run={"output_dir": str(tmp_path / "runs")})
    del recipe["tokenizer"]
    run = wmtp.run(recipe)
    assert (run.model / "wmtp_tokenizer.json").is_file()
    wmtp.export(theirs, tmp_path / "merged", format="hf")
    assert (tmp_path / "merged/wmtp_tokenizer.json").is_file()


def test_the_base_is_found_or_asked_for_and_another_is_refused(base, tmp_path):
    make(base).save_pretrained(tmp_path / "adapter")
    other = tmp_path / "other"
    SMALL.build().load(None, dtype=torch.float32, seed=2).model.save_pretrained(other)
    with pytest.raises(WMTPError, match=r"trained on another model than .*other.*: models\.base\.base_uri"):
        HfLoader(base_uri=str(other)).load(tmp_path / "adapter", dtype=torch.float32, seed=0)
    file, own = tmp_path / "adapter/adapter_config.json", tmp_path / "adapter/wmtp_adapter.json"
    content = json.loads(file.read_text())
    assert content["base_model_name_or_path"] == str(base.resolve())
    own.unlink()
    for name, said in (("../gone", "no such file or folder"), (None, "names no base_model_name_or_path")):
        file.write_text(json.dumps(content | {"base_model_name_or_path": name}))
        with pytest.raises(ConfigError, match=rf"its base is not found: .*{said}.*models\.base\.base_uri"):
            HfLoader().info(tmp_path / "adapter")
        assert HfLoader(base_uri=str(base)).info(tmp_path / "adapter").heads == HeadsConfig(kind="block", horizon=3)
    file.write_text(json.dumps(content | {"base_model_name_or_path": "../other"}))  # beside it
    assert HfLoader().load(tmp_path / "adapter", dtype=torch.float32, seed=0).adapter.fingerprint is None
    with pytest.raises(ConfigError, match=r"base_uri: has no effect"):
        HfLoader(base_uri=str(base)).info(base)
    wide = evolve(SMALL, hidden_size=32).build().load(None, dtype=torch.float32, seed=2).model
    wide.save_pretrained(other)
    make(base, horizon=1).save_pretrained(tmp_path / "adapter")
    own.unlink()
    file.write_text(json.dumps(content | {"base_model_name_or_path": "../other"}))
    with pytest.raises(
        FileError, match=r"adapter: the tensors .* do not fit its base: .* has shape \[2, 16\] in place of \[2, 32\]"
    ):
        load_model(tmp_path / "adapter")


def test_a_base_that_was_changed_in_pefts_file_is_the_base(base, tmp_path, caplog):
    """PEFT opens the one that is named there; a place that WMTP noted must not hide it."""
    make(base).save_pretrained(tmp_path / "adapter")
    other = tmp_path / "other"
    SMALL.build().load(None, dtype=torch.float32, seed=2).model.save_pretrained(other)
    file = tmp_path / "adapter/adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"base_model_name_or_path": str(other)}))
    with pytest.raises(WMTPError, match=r"trained on another model than .*other.*"):
        load_model(tmp_path / "adapter")
    assert not caplog.records
    file.write_text(json.dumps(content | {"base_model_name_or_path": "/nowhere/base"}))
    assert load_model(tmp_path / "adapter").adapter is not None
    (said,) = [record.getMessage() for record in caplog.records if "adapter_config.json" in record.getMessage()]
    assert said.endswith(f"the base that adapter_config.json names is not there (/nowhere/base); {base.resolve()} is used")


def test_a_base_of_the_config_is_taken_whatever_the_files_say(base, tmp_path, caplog):
    make(base).save_pretrained(tmp_path / "adapter")
    for name, key, value in (
        ("adapter_config.json", "base_model_name_or_path", "/nowhere/base"),
        ("wmtp_adapter.json", "base_uri", "hf://no name@@"),
    ):
        file = tmp_path / "adapter" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        found, _ = adapter_folder.find_base(tmp_path / "adapter", str(base), StorageConfig())
        assert found == base.resolve()
    assert not caplog.records


@pytest.mark.parametrize(
    ("uri", "name", "may"),
    [
        ("/a/b", "/a/b", True),
        ("/a/b", "/a/c", False),
        ("hf://org/name", "org/name", True),
        ("hf://org/name@abc", "org/name", True),
        ("hf://org/name", "org/other", False),
        ("hf://org/name/inside", "/home/me/.cache/x", True),
        ("hf://org/name/inside", "org/other", False),
        ("s3://bucket/name", "/home/me/.cache/x", True),
        ("s3://bucket/name", "org/other", False),
    ],
)
def test_names_that_pefts_file_may_have_for_a_base(uri, name, may):
    assert adapter_folder._may_be_named(uri, name) is may


def test_what_is_no_adapter_of_lora_is_refused(base, tmp_path):
    make(base).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for change, said in (
        ({"peft_type": "IA3"}, "of type IA3, and WMTP opens LORA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, r"more than LoRA's two matrices a linear map \(bias = 'all'\)"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"r": 0}, "r = 0 and lora_alpha = 4"),
        ({"r": "4"}, "r = '4' and lora_alpha = 4"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"target_modules": None}, "target_modules = None, and PEFT has the names of modules"),
        ({"target_modules": [3]}, r"target_modules = \[3\]"),
        ({"rank_pattern": "v_proj"}, "rank_pattern = 'v_proj', and PEFT has a table of ranks"),
        ({"rank_pattern": {"v_proj": "3"}}, "rank_pattern = {'v_proj': '3'}"),
        ({"alpha_pattern": None}, "alpha_pattern = None, and PEFT has a table of numbers"),
        ({"layers_to_transform": "all"}, "layers_to_transform = 'all', and PEFT has numbers of layers"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(WMTPError, match=said):
            HfLoader().info(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapters_weights_alone_are_named(tmp_path, capsys, name):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / name).touch()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'models.base = {{type = "hf", uri = "{folder}"}}\ndatasets.a.type = "python-source"\ntrainer.type = "baseline-mtp"\n'
    )
    said = f"{folder}: holds an adapter's weights ({name}) and no adapter_config.json"
    for words in (
        ["check", recipe],
        ["generate", folder, "--prompt", "a"],
        ["export", folder, tmp_path / "out", "--format", "hf"],
    ):
        assert main([str(word) for word in words]) == 2
        assert said in capsys.readouterr().err


def _only(names, tensors):
    return {name: tensor for name, tensor in tensors.items() if names in name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {next(iter(t)): torch.full((2, 16), torch.nan)}, "holds numbers that are not finite; fetch"),
        (lambda t: {name: tensor.to(torch.int8) for name, tensor in t.items()}, r"holds whole numbers \(torch\.int8\)"),
        (partial(_only, "layers.0"), r"layers\.1\..* is missing; .*models\.base\.base_uri"),
        (lambda t: {name.replace("q_proj", "query"): tensor for name, tensor in t.items()}, "q_proj.lora_A.weight is missing"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, r"lm_head\.weight is unexpected"),
    ],
)
def test_tensors_that_are_none_of_the_adapter_are_refused(base, tmp_path, change, said):
    from safetensors.torch import load_file, save_file

    make(base, horizon=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(FileError, match=said):
        load_model(tmp_path)
    if "holds" not in said:  # a dry run reads names and shapes alone
        with pytest.raises(FileError, match=said):
            HfLoader().info(tmp_path)


def test_files_that_are_damaged_or_pickled_are_refused(base, tmp_path):
    make(base, horizon=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-40], whole[:20], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(content)
        for action in (HfLoader().info, load_model):
            with pytest.raises(FileError, match=r"adapter_model\.safetensors: not a whole safetensors file .*; fetch it again"):
                action(tmp_path)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileError, match=r"adapter_model\.bin is a pickle, which WMTP never opens: PEFT's save_pretrained"):
        HfLoader().info(tmp_path)


@pytest.mark.parametrize("init", ["olora", "pissa", "wrong"])
def test_an_adapter_that_began_with_numbers_of_its_base(base, tmp_path, init):
    """PEFT takes them out of the base when it opens the adapter, too."""
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False if init == "wrong" else init)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path)
    if init == "wrong":
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "wrong"}))
        with pytest.raises(FileError, match="PEFT refuses the adapter's settings: Unknown initialization"):
            load_model(tmp_path)
        return
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    model = load_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(IDS), 1), theirs(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("settings", "targets", "said"),
    [
        ({"target_modules": "all-linear"}, "all-linear", None),
        ({"target_modules": r".*\.q_proj"}, ["q_proj"], None),
        ({"target_modules": r".*\.q_proj"}, ["v_proj"], r"\['v_proj'\], but .* has \['\.\*"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, ["model.layers.0.self_attn.q_proj"], None),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            ["q_proj"],
            r"has \['model\.layers\.0\.self_attn\.q_proj'\]",
        ),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}, ["q_proj"], None),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}, "lora_dropout": 0.1}, ["q_proj"], None),
        ({"target_modules": ["q_proj", "lm_head"]}, ["q_proj"], r"the adapter is on lm_head too"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, ["q_proj"], r"the adapter is on model\.embed_tokens too"),
    ],
)
def test_the_targets_of_an_adapter_are_the_maps_that_it_is_on(base, tmp_path, caplog, settings, targets, said):
    """However PEFT writes them; PEFT's own all-linear is the whole name of each map."""
    from transformers import AutoModelForCausalLM

    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **settings)
    ).eval()
    theirs.save_pretrained(tmp_path)
    lora = LoraConfig(rank=2, targets=targets if isinstance(targets, str) else tuple(targets))
    loaded = HfLoader().load(tmp_path, dtype=torch.float32, seed=0)
    if said is not None:
        with pytest.raises((ConfigError, FileError), match=said):  # exit code 2
            build_model(loaded, HeadsConfig(horizon=2), 0, lora=lora)
        return
    with caplog.at_level("INFO", "wmtp"):
        model = build_model(loaded, HeadsConfig(horizon=2), 0, lora=lora)
    torch.testing.assert_close(model.logits(model(IDS), 1), theirs(input_ids=IDS).logits)
    assert ("had dropout 0.1; it goes on without" in caplog.text) == ("lora_dropout" in settings)
    assert ("keeps its rank_pattern: {'q_proj': 3}" in caplog.text) == ("rank_pattern" in settings)


def test_targets_that_are_nowhere_are_said(base, tmp_path):
    make(base).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for targets, said in ((["gone"], r"targets of the adapter \(gone\) are nowhere"), ("(", "are no pattern")):
        file.write_text(json.dumps(content | {"target_modules": targets}))
        with pytest.raises(WMTPError, match=said):
            load_model(tmp_path)


@pytest.mark.parametrize("heads", ["full", "adapters"])
@pytest.mark.parametrize("name", ["mimo", "glm4_moe"])
def test_a_models_own_layers_for_multi_token_prediction_learn_beside_an_adapter(tmp_path, heads, name):
    """They are in the adapter's folder, for want of the model's; merged, they go back to their place."""
    from safetensors.torch import load_file

    base = native_folder(tmp_path / "base", name)
    loaded = HfLoader().load(base, dtype=torch.float32, seed=0)
    model = build_model(loaded, None, 0, lora=LoraConfig(rank=2, heads=heads), name=name_base(str(base), base)).eval()
    assert model.heads.kind == "native"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (heads == "full" and name.startswith("extra_heads.")):
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    with torch.no_grad():
        assert all(torch.equal(left, right) for left, right in zip(again(IDS).hidden, model(IDS).hidden, strict=True))
        again.merge_adapter()
        again.save_pretrained(tmp_path / "merged")
        merged = load_model(tmp_path / "merged")
        assert merged.heads.kind == "native"
        assert all(torch.equal(left, right) for left, right in zip(merged(IDS).hidden, again(IDS).hidden, strict=True))
    names = {name for file in base.glob("*.safetensors") for name in load_file(file)}
    assert {name for file in (tmp_path / "merged").glob("model*.safetensors") for name in load_file(file)} == names


def test_adapted_heads_go_on_under_the_same_settings_or_learn_whole(base, tmp_path):
    lora = LoraConfig(rank=2, heads="adapters")
    model = make(base, lora=lora, init="copy")
    model.save_pretrained(tmp_path)
    loaded = HfLoader().load(tmp_path, dtype=torch.float32, seed=0)
    goes_on = build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), None, 0, lora=lora)
    assert goes_on.learned_state().keys() == model.learned_state().keys()
    with pytest.raises(ConfigError, match=r"models\.base\.lora\.heads: 'full', but the adapter in .* has 'adapters'"):
        build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), None, 0, lora=LoraConfig(rank=2))
    whole = build_model(loaded, None, 0)
    merge_brought(whole)
    assert whole.adapter is None
    assert not whole.fixed_parameters()
    torch.testing.assert_close(whole(IDS).hidden, model(IDS).hidden)

"""Runs with adapters from end to end: learned, resumed, opened by others, merged, and by two processes as by one."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from attrs import evolve

import wmtp
from wmtp.errors import ConfigError
from wmtp.models.config import ScratchModel
from wmtp.tokenizers.config import Bytes

pytest.importorskip("peft")

SMALL = ScratchModel(vocab_size=258, hidden_size=32, layers=2, attention_heads=2, intermediate_size=48, max_positions=128)
IDS = torch.tensor([[100, 101, 102, 103]])


@pytest.fixture
def adapted(recipe):
    """The recipe with an adapter on a model in files."""
    base = recipe.parent / "base"
    SMALL.build().load(None, dtype=torch.float32, seed=1).model.save_pretrained(base)
    Bytes().build(None).save(base)
    text = recipe.read_text()
    start, end = text.index("[models.base]"), text.index("[models.base.heads]")
    table = f'[models.base]\ntype = "hf"\nuri = "{base}"\n[models.base.lora]\nrank = 4\n'
    recipe.write_text(text[:start] + table + text[end:])
    return recipe


def learned(folder: Path):
    from safetensors.torch import load_file

    return {f"{file.name}: {k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def resumed(whole):
    """Train a run's end once more, from a checkpoint in its middle, and return what it has learned: the same, bit for bit."""
    before = learned(whole.model)
    for step in ("step-8", "step-10"):
        shutil.rmtree(whole.run_dir / "checkpoints" / step, ignore_errors=True)
    shutil.rmtree(whole.model)
    wmtp.run(resume=whole.run_dir)
    after = learned(whole.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return after


@pytest.mark.parametrize(
    ("precision", "heads"),
    [
        ("bf16-params", "adapters"),
        *(pytest.param(precision, "full", marks=pytest.mark.slow) for precision in ("fp32", "bf16-params")),
    ],
)
def test_a_run_is_resumed_bit_for_bit_and_its_model_serves_every_command(adapted, precision, heads, tmp_path):
    """Checkpoints hold what learns and nothing of the base; ``model/`` is an adapter with heads."""
    import peft

    settings = [f'devices.precision="{precision}"', "train.max_steps=10", "optimizer.lr=0.02"]
    settings.append(f'models.base.lora.heads="{heads}"')
    whole = wmtp.run(adapted, run_name="whole", overrides=settings)
    names = {file.name for file in whole.model.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "mtp_heads.safetensors"} <= names
    assert not {"model.safetensors", "config.json"} & names
    (shard,) = whole.checkpoint.glob("*.safetensors")
    count = sum(tensor.numel() for name, tensor in learned(whole.model).items() if heads == "full" or "lora_" in name)
    assert shard.stat().st_size < 12 * count + 40_000, "weights and two means of heads and adapter"
    before = learned(whole.model)

    for folder in (whole.checkpoint, whole.model):
        shutil.rmtree(folder)
    resumed = wmtp.run(resume=whole.run_dir)
    assert resumed.model == whole.model
    after = learned(whole.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    exact = precision == "fp32"
    model = wmtp.load_model(whole.run_dir)
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(whole.model, dtype=model.anatomy.output.weight.dtype).eval()
    with torch.no_grad():
        logits = model.logits(model(IDS), 1)
        torch.testing.assert_close(opened(input_ids=IDS).logits, logits, rtol=0, atol=1e-5 if exact else 0.05)
        wmtp.export(whole.run_dir, tmp_path / "hf", format="hf")
        wmtp.export(whole.run_dir, tmp_path / "own", format="wmtp")
        alone, both = wmtp.load_model(tmp_path / "hf"), wmtp.load_model(tmp_path / "own")
        assert (alone.horizon, both.horizon, both.adapter) == (1, 3, None)
        for merged in (alone, both):
            torch.testing.assert_close(merged.logits(merged(IDS), 1), logits, rtol=0, atol=1e-5 if exact else 0.05)
        plain = wmtp.load_model(tmp_path / "base")
        assert (plain.logits(plain(IDS), 1) - logits).abs().max() > 0.05
    assert len(wmtp.generate(whole.run_dir, "def f1", max_new_tokens=4, speculative=True).tokens) == 4
    measured = wmtp.evaluate(whole.run_dir, overrides=['eval=[{type="perplexity"}]'])
    assert measured.numbers["perplexity/head_1"] == pytest.approx(
        math.exp(whole.metrics["eval/loss/head_1"]), rel=1e-4 if exact else 0.05
    )


@pytest.fixture
def experts(adapted):
    """The recipe with an adapter on a mixture of experts whose router is balanced, learned in three stages."""
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.3}
    shape = evolve(SMALL, architecture="mixtral", options=options)
    shape.build().load(None, dtype=torch.float32, seed=1).model.save_pretrained(adapted.parent / "base")
    data = adapted.parent / "code.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    graded = (row | {"group": f"g{number // 2}", "is_correct": number % 2 == 0} for number, row in enumerate(rows))
    data.write_text("".join(json.dumps(row) + "\n" for row in graded))
    stages = 'type = "critic-wmtp"\nvalue_steps = 3\nvalue_learns = true'
    text = adapted.read_text().replace('type = "baseline-mtp"', stages).replace("warmup_steps = 4", "warmup_steps = 2")
    adapted.write_text(text.replace("save_interval = 5", "save_interval = 1\nkeep_last = 0").replace("lr = 3e-3", "lr = 2e-2"))
    return adapted


BALANCED = ("train.max_steps=8", "data.train.micro_batch_size=2")


def balances(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["stage"], line.get("router/balance"), line.get("router/load_max")) for line in lines]


def test_experts_and_stages_are_resumed_inside_a_stage(experts):
    whole = wmtp.run(experts, run_name="whole", overrides=BALANCED)
    before, found = learned(whole.model), balances(whole.run_dir)
    assert [stage for stage, _, _ in found] == ["head-warmup"] * 2 + ["value"] * 3 + ["train"] * 3
    assert [balance is None for _, balance, _ in found] == [False] * 2 + [True] * 3 + [False] * 3  # of the model's own loss
    for step in range(4, 9):
        shutil.rmtree(whole.run_dir / f"checkpoints/step-{step}")
    shutil.rmtree(whole.model)
    wmtp.run(resume=whole.run_dir)
    after = learned(whole.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert balances(whole.run_dir) == found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "none"])
def test_two_processes_balance_experts_as_one_does(experts, preloaded, strategy, tmp_path):
    two = ("--set", "launcher.processes=2", "--set", f'devices.fsdp.strategy="{strategy}"')
    settings = [word for override in (*BALANCED, "data.train.batch_size=5") for word in ("--set", override)]
    for name, extra in (("one", ()), ("two", two)):
        run = preloaded.run("run", experts, "--run-name", name, *settings, *extra)
        assert run.returncode == 0, run.stderr
    one, other = (balances(tmp_path / "runs" / name) for name in ("one", "two"))
    assert [stage for stage, *_ in one] == [stage for stage, *_ in other]
    numbers, others = ([number for _, *found in run for number in found if number is not None] for run in (one, other))
    assert len(numbers) == 2 * 5
    assert numbers == pytest.approx(others, rel=1e-4)


def test_on_weights_in_fp8_a_run_is_resumed_bit_for_bit_and_exported_from_the_weights_in_the_files(adapted, tmp_path, caplog):
    pytest.importorskip("torchao")
    fp8 = 'devices={precision="fp8",fp8={emulate=true,min_features=16}}'
    with caplog.at_level("INFO", "wmtp"):
        whole = wmtp.run(adapted, run_name="whole", overrides=["train.max_steps=8", "optimizer.lr=0.02", fp8])
    assert "the weights of 14 of them never learn and are kept in fp8" in caplog.text
    after = resumed(whole)
    wmtp.export(whole.run_dir, tmp_path / "hf", format="hf")
    base, merged = (learned(tmp_path / name) for name in ("base", "hf"))
    name = "model.layers.1.mlp.up_proj"
    a, b = (after[f"adapter_model.safetensors: base_model.model.{name}.lora_{matrix}.weight"].float() for matrix in "AB")
    expected = base[f"model.safetensors: {name}.weight"] + 2 * b @ a
    found = merged[f"model.safetensors: {name}.weight"].float()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=4e-4)  # fp8 would be off by ten times that
    shutil.rmtree(whole.run_dir / "checkpoints/step-8")
    settings = ["train.max_steps=8", "optimizer.lr=0.02", 'devices.precision="bf16-params"']
    assert wmtp.run(adapted, resume=whole.run_dir, overrides=settings).steps == 8, "on weights that are not rounded"
    measured = wmtp.evaluate(whole.run_dir, overrides=['eval=[{type="perplexity"}]'])
    assert measured.numbers["perplexity/head_1"] == pytest.approx(math.exp(whole.metrics["eval/loss/head_1"]), rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16-params", marks=pytest.mark.slow)])
def test_a_reference_that_is_the_base_takes_no_second_model(adapted, precision, tmp_path, monkeypatch, caplog):
    """The same run as with a copy of the base in another folder."""
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    kind = "bf16" if precision == "bf16-params" else "fp32"
    found = []
    for name in ("base", "copy"):
        text = adapted.read_text().replace('type = "baseline-mtp"', f'type = "rho1-wmtp"\nreference_precision = "{kind}"')
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(text + f'\n[models.ref]\ntype = "hf"\nuri = "{tmp_path / name}"\n')
        settings = [
            f'devices.precision="{precision}"',
            "train.max_steps=7",
            "data.train.micro_batch_size=2",
            "optimizer.lr=0.02",
        ]
        caplog.clear()
        with caplog.at_level("INFO", "wmtp"):
            result = wmtp.run(recipe, run_name=name, overrides=settings)
        said = [record for record in caplog.records if "with its adapter off" in record.getMessage()]
        assert len(said) == (name == "base")
        found.append(learned(result.model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_the_start_model_of_asft_is_the_base_without_its_adapter(adapted, monkeypatch, caplog):
    """The same run as with a copy of the start model, and away from one without an anchor."""
    import wmtp.training.setup as setup

    found, settings = {}, ["train.max_steps=7", "optimizer.lr=0.02", "models.base.heads.warmup_steps=0"]
    for name, anchor in (("off", 0.5), ("copy", 0.5), ("free", 0.0)):
        if name == "copy":
            monkeypatch.setattr(setup, "_has_start", lambda *_: False)
        trainer = f'trainer={{type="asft",kl_weight={anchor}}}'
        caplog.clear()
        with caplog.at_level("INFO", "wmtp"):
            result = wmtp.run(adapted, run_name=name, overrides=[*settings, trainer])
        assert any("with its adapter off" in record.getMessage() for record in caplog.records) == (name == "off")
        found[name] = learned(result.model)
    assert all(torch.equal(found["off"][key], found["copy"][key]) for key in found["off"])
    assert not all(torch.equal(found["off"][key], found["free"][key]) for key in found["off"])


def test_an_adapter_folder_is_a_model_that_learns_on_or_whole(adapted, tmp_path):
    first = wmtp.run(adapted, run_name="first", overrides=["train.max_steps=6"])
    here = f'models.base.uri="{first.run_dir}"'
    again = wmtp.run(adapted, run_name="again", overrides=[here, "train.max_steps=6", "models.base.heads.warmup_steps=0"])
    config = json.loads((again.model / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    _other_settings_are_refused(adapted, first.run_dir)
    text = adapted.read_text().replace("[models.base.lora]\nrank = 4\n", "")
    adapted.write_text(text)
    full = wmtp.run(adapted, run_name="full", overrides=[here, "train.max_steps=6"])
    assert (full.model / "config.json").is_file()
    assert not (full.model / "adapter_config.json").exists()


def _other_settings_are_refused(recipe, adapter):
    """By ``check`` where small files tell, else before the data is read, whose last line is damaged."""
    data = recipe.parent / "code.jsonl"
    examples = data.read_text()
    data.write_text(examples + "no JSON\n")
    here, text = f'models.base.uri="{adapter}"', recipe.read_text()
    line = text[: text.index("rank = 4")].count("\n") + 1
    recipe.write_text(text.replace("rank = 4", "rank = 8"))
    with pytest.raises(ConfigError, match=rf"recipe\.toml:{line}: models\.base\.lora\.rank: 8, but .* has 4; write that"):
        wmtp.check(recipe, overrides=[here])
    recipe.write_text(text)
    for override, said in (
        ("models.base.lora.alpha=3.5", r"lora\.alpha: 3\.5, but the adapter in .* has 8; write that, or merge it first"),
        ("models.base.lora.dora=true", r"lora\.dora: True, but .* has False"),
        ("models.base.lora.rslora=true", r"lora\.rslora: True, but .* has False"),
        ('models.base.lora.heads="adapters"', r"lora\.heads: 'adapters', but .* has 'full'"),
        ('models.base.quantize="nf4"', r'base\.quantize: "nf4", but .* learned with no quantize'),
    ):
        with pytest.raises(ConfigError, match=said):
            wmtp.check(recipe, overrides=[here, override])
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=r"lora\.targets: \['q_proj'\], but the adapter in .* has \['down_proj', "):
            wmtp.run(recipe, overrides=[here, 'models.base.lora.targets=["q_proj"]'], dry_run=dry_run)
    data.write_text(examples)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["models.base.lora.rank=0"], r"recipe\.toml|models\.base\.lora\.rank: .*must be >= 1"),
        (["models.base.lora.dropout=0.05"], r"models\.base\.lora\.dropout: 0\.05, but adapters learn without dropout"),
        (["models.base.lora.targets=[]"], r"models\.base\.lora\.targets"),
        (
            ['models.base.lora.heads="adapters"', 'models.base.heads.kind="shared"'],
            r"lora\.heads: heads that are of kind 'shared'",
        ),
        (['models.base.lora.heads="adapters"', "models.base.heads.horizon=1"], r"lora\.heads: there are no heads 2\.\.H"),
        (["models.base.lora.rnak=3"], r"models\.base\.lora\.rnak: unknown key; did you mean 'rank'"),
        (['optimizer={type="adamw-8bit"}', "launcher.processes=2"], r"'adamw-8bit' takes whole parameters, which FSDP divides"),
        (['models.ref={type="hf",uri="x",lora={}}'], r"models\.ref\.lora: only models\.base has adapters"),
        (['models.base={type="scratch",vocab_size=258,lora={}}'], r"models\.base\.lora: a model of type 'scratch' is no"),
    ],
)
def test_what_cannot_be_is_said_by_check(adapted, overrides, said):
    with pytest.raises(ConfigError, match=said):
        wmtp.check(adapted, overrides=overrides)


def test_a_target_that_only_the_model_shows_to_be_none_is_said_by_a_dry_run(adapted):
    text = adapted.read_text().replace("rank = 4", 'rank = 4\ntargets = ["q_proj", "input_layernorm"]')
    adapted.write_text(text)
    line = text[: text.index("targets")].count("\n") + 1
    wmtp.check(adapted)
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=rf"^{adapted}:{line}: models\.base\.lora\.targets\.1: 'input_layernorm' means"):
            wmtp.run(adapted, dry_run=dry_run)


def test_adapters_that_heads_cannot_have_are_said_before_the_data_is_read(adapted):
    with (adapted.parent / "code.jsonl").open("a") as data:
        data.write("no JSON\n")
    settings = ['models.base.lora.heads="adapters"', 'models.base.lora.targets=["model.layers.1.self_attn.q_proj"]']
    for dry_run in (True, False):
        with pytest.raises(
            ConfigError, match=r"lora\.heads: none of model\.layers\.1\.self_attn\.q_proj is in the heads' layers"
        ):
            wmtp.run(adapted, overrides=settings, dry_run=dry_run)


def test_the_options_of_storage_reach_the_base_of_an_adapter(adapted, tmp_path, monkeypatch):
    """In a run, and in what opens its model later, which has no config of its own."""
    first = wmtp.run(adapted, overrides=["train.max_steps=6"])
    base, model = tmp_path / "base", first.model
    own = model / "wmtp_adapter.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"base_uri": "far://store/base"}))
    asked = []

    def localize(uri, backends, cache_dir, **_):
        asked.append((uri, cache_dir))
        return base

    monkeypatch.setattr("wmtp.models.adapter_folder.localize_model", localize)
    again = [f'models.base.uri="{model}"', 'storage.cache_dir="/tmp/there"', "train.max_steps=6"]
    second = wmtp.run(adapted, overrides=again)
    wmtp.load_model(second.run_dir)
    wmtp.export(second.run_dir, tmp_path / "merged", format="wmtp")
    wmtp.evaluate(second.run_dir, overrides=['eval=[{type="perplexity"}]'])
    assert len(asked) >= 4
    assert set(asked) == {("far://store/base", Path("/tmp/there"))}


def test_without_peft_check_says_what_to_install(adapted, monkeypatch):
    import wmtp.config.adapter_rules as rules

    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"models\.base\.lora: needs peft: pip install 'wmtp-core\[lora\]'"):
        wmtp.check(adapted)


def test_another_base_under_the_same_name_ends_a_resume(adapted, tmp_path):
    done = wmtp.run(adapted, run_name="x", overrides=["train.max_steps=6"])
    for folder in (done.checkpoint, done.model):
        shutil.rmtree(folder)
    SMALL.build().load(None, dtype=torch.float32, seed=2).model.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="holds an adapter of another model than this"):
        wmtp.run(resume=done.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "none"])
@pytest.mark.parametrize(
    ("precision", "quantize", "heads"),
    [
        ("fp32", "", "full"),
        ("bf16-params", "", "full"),
        ("fp32", "nf4", "full"),
        ("fp32", "", "adapters"),
        ("fp8", "", "full"),
        ("fp8", "", "adapters"),
    ],
)
def test_two_processes_learn_what_one_does(adapted, preloaded, strategy, precision, quantize, heads, tmp_path):
    settings = ("--set", "train.max_steps=8", "--set", f"devices.precision={precision}")
    settings += ("--set", f"models.base.lora.heads={heads}")
    if precision == "fp8":
        pytest.importorskip("torchao")
        settings += ("--set", "devices.fp8={emulate=true,min_features=16}")
    if quantize:
        pytest.importorskip("bitsandbytes")
        settings += ("--set", f'models.base.quantize="{quantize}"')
    two = ("--set", "launcher.processes=2", "--set", f'devices.fsdp.strategy="{strategy}"')
    for name, extra in (("one", ()), ("two", two)):
        run = preloaded.run("run", adapted, "--run-name", name, *settings, *extra)
        assert run.returncode == 0, run.stderr
    one, other = (learned(tmp_path / f"runs/{name}/model") for name in ("one", "two"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < (1e-4 if precision == "fp32" else 2e-2), name


def test_a_run_on_4_bits_is_resumed_bit_for_bit_and_exported(adapted, tmp_path):
    pytest.importorskip("bitsandbytes")
    optimizer = 'optimizer={type="adamw-8bit",lr=0.02}'
    settings = ['models.base.quantize="nf4"', "train.max_steps=8", optimizer, 'devices.precision="bf16-params"']
    whole = wmtp.run(adapted, run_name="whole", overrides=settings)
    resumed(whole)
    measured = wmtp.evaluate(whole.run_dir, overrides=['eval=[{type="perplexity"}]'])
    assert measured.numbers["perplexity/head_1"] == pytest.approx(math.exp(whole.metrics["eval/loss/head_1"]), rel=1e-2)
    wmtp.export(whole.run_dir, tmp_path / "own", format="wmtp")
    model, merged = wmtp.load_model(whole.run_dir), wmtp.load_model(tmp_path / "own")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).hidden[2], model(IDS).hidden[2], rtol=0, atol=0.2)


def test_4_bits_without_an_adapter_or_without_bitsandbytes_are_refused(adapted, monkeypatch):
    import wmtp.config.adapter_rules as rules

    monkeypatch.setattr(rules, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(ConfigError, match=r"quantize: needs bitsandbytes: pip install 'wmtp-core\[bnb\]'"):
        wmtp.check(adapted, overrides=['models.base.quantize="nf4"'])
    adapted.write_text(adapted.read_text().replace("[models.base.lora]\nrank = 4\n", ""))
    with pytest.raises(ConfigError, match=r"quantize: weights in 4 bits cannot learn; add the table \[models\.base\.lora\]"):
        wmtp.check(adapted, overrides=['models.base.quantize="nf4"'])

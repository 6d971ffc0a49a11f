"""rho1-wmtp and its controls as a user runs them: TOML, a command, real files."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from wmtp import load_config, run
from wmtp.config.rules import check
from wmtp.errors import ConfigError
from wmtp.training import run as training_run
from wmtp_algos import Rho1WMTP, rho1_wmtp
from wmtp_algos.rho1_wmtp import next_token_losses

BASE = """
[run]
output_dir = "{folder}/runs"
[models.base]
type = "scratch"
vocab_size = 258
hidden_size = 32
layers = 2
attention_heads = 2
intermediate_size = 48
max_positions = 64
[models.base.heads]
horizon = 3
[tokenizer]
type = "bytes"
[datasets.code]
type = "jsonl"
uri = "{folder}/code.jsonl"
[data.train]
max_length = 64
batch_size = 4
micro_batch_size = 3
[optimizer]
lr = 3e-3
[train]
max_steps = 8
[checkpoints]
save_interval = 4
[tracker]
type = "jsonl"
"""


@pytest.fixture(scope="module")
def wmtp(preloaded):
    def run(*arguments):
        done = preloaded.run(*arguments)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def succeeds(wmtp):
    def run(*arguments):
        done = wmtp(*arguments)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, succeeds):
    """A data set, and a reference model that a baseline run left."""
    folder = tmp_path_factory.mktemp("rho1")
    with (folder / "code.jsonl").open("w") as file:
        for i in range(40):
            lines = "\n".join(f"    x{j} = {i * j % 17}" for j in range(i % 5 + 1))
            file.write(json.dumps({"id": f"f{i}", "prompt": f"def f{i}():\n", "completion": lines}) + "\n")
    (folder / "base.toml").write_text(BASE.format(folder=folder))
    succeeds("run", folder / "base.toml", "--run-name", "reference", "--set", "trainer.type=baseline-mtp")
    return folder


def recipe(folder, name, *, trainer, model=None):
    reference = f'[models.ref]\ntype = "hf"\nuri = "{model or folder / "runs/reference/model"}"\n'
    path = folder / f"{name}.toml"
    path.write_text(reference * (model != "") + trainer)
    return path


def metrics_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "weight/mean" in line]


@pytest.mark.parametrize(
    ("name", "trainer"),
    [
        ("weighted", '[trainer]\ntype = "rho1-wmtp"\nmode = "weighted"\n'),
        ("skip", '[trainer]\ntype = "rho1-wmtp"\nmode = "token-skip"\nkeep = 0.25\nreference_precision = "bf16"\n'),
        ("shuffled", '[trainer]\ntype = "shuffled"\n[trainer.of]\ntype = "rho1-wmtp"\nmode = "token-skip"\nkeep = 0.25\n'),
    ],
)
def test_a_run_learns_by_the_reference(folder, name, trainer, succeeds):
    result = json.loads(
        succeeds("run", folder / "base.toml", recipe(folder, name, trainer=trainer), "--run-name", name, "--json").stdout
    )
    assert result["steps"] == 8
    steps = metrics_of(folder / "runs" / name)
    assert len(steps) == 8
    for step in steps:
        if name == "weighted":
            assert 0 < step["weight/mean"] <= 1.0 + 1e-6
            assert step["weight/max"] <= 3.0
            assert step["weight/std"] > 0.02
        else:
            assert step["weight/mean"] == pytest.approx(0.25, abs=0.01)
            assert step["weight/zero_share"] == pytest.approx(0.75, abs=0.01)
        assert step["rho1/reference_loss"] < steps[0]["loss/head_1"], "eight steps of training have taught the reference"


def test_a_resumed_control_draws_what_the_whole_run_drew(folder, succeeds):
    trainer = '[trainer]\ntype = "shuffled"\n[trainer.of]\ntype = "rho1-wmtp"\nmode = "token-skip"\nkeep = 0.25\n'
    succeeds("run", folder / "base.toml", recipe(folder, "whole", trainer=trainer), "--run-name", "parts")
    whole, parts = folder / "runs/whole", folder / "runs/parts"
    shutil.copytree(parts, whole)
    shutil.rmtree(parts / "model")
    shutil.rmtree(parts / "checkpoints/step-8")
    succeeds("run", "--resume", parts)
    assert [(line["step"], line["loss"]) for line in metrics_of(parts)] == [
        (line["step"], line["loss"]) for line in metrics_of(whole)
    ]


@pytest.mark.parametrize("command", [["check"], ["run", "--dry-run"], ["run"]], ids=" ".join)
def test_without_a_reference(folder, command, wmtp):
    path = recipe(folder, "none", model="", trainer='[trainer]\ntype = "rho1-wmtp"\n')
    done = wmtp(*command, folder / "base.toml", path)
    assert done.returncode == 2
    assert "models.ref: required by the trainer 'rho1-wmtp', and missing" in done.stderr


def test_a_control_needs_the_models_of_its_treatment(folder, wmtp):
    path = recipe(folder, "none", model="", trainer='[trainer]\ntype = "shuffled"\n[trainer.of]\ntype = "rho1-wmtp"\n')
    done = wmtp("check", folder / "base.toml", path)
    assert done.returncode == 2
    assert "models.ref: required by the trainer 'rho1-wmtp', and missing" in done.stderr


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("keep = 0", "keep"),
        ("keep = 0.0", "keep"),
        ("keep = 1.5", "keep"),
        ("keep = nan", "keep"),
        ("temperature = 0.0", "temperature"),
        ("max_weight = 0.5", "max_weight"),
        ("min_excess = -0.1", "min_excess"),
        ('mode = "skip"', "mode"),
        ('scope = "row"', "scope"),
        ('score = "signed"', "score"),
        ('reference_device = "gpu"', "reference_device"),
    ],
)
def test_values_that_make_no_sense(folder, setting, problem):
    path = recipe(folder, "bad", trainer=f'[trainer]\ntype = "rho1-wmtp"\n{setting}\n')
    with pytest.raises(ConfigError) as caught:
        load_config([folder / "base.toml", path])
    assert f"bad.toml:6: trainer.{problem}: " in str(caught.value)


@pytest.mark.parametrize("mode", ["weighted", "token-skip"])
def test_the_recipe_over_the_quickstart(folder, monkeypatch, mode):
    root = Path(__file__).resolve().parents[3]
    monkeypatch.setenv("REFERENCE", str(folder / "runs/reference/model"))
    sources = [root / "examples/quickstart.toml", root / f"configs/recipes/rho1-{mode}.toml"]
    config = load_config(sources, ["data.train.max_length=64"])  # the positions of the reference
    check(config)
    assert config.trainer == Rho1WMTP(mode=mode), "the recipes show the defaults"


# --- the cache of reference losses


def run_here(folder, name, reference, *settings, cache=True):
    """A run in this process over two epochs; what each step weighed."""
    trainer = f'[trainer]\ntype = "rho1-wmtp"\nmode = "weighted"\nreference_cache = {str(cache).lower()}\n'
    path = recipe(folder, name, trainer=trainer, model=reference)
    overrides = ["train.max_steps=12", 'checkpoints={"save_final"=false}', f"data.cache_dir={folder}/tokens", *settings]
    run([folder / "base.toml", path], overrides=overrides, run_name=name)
    return [(line["weight/std"], line["rho1/reference_loss"]) for line in metrics_of(folder / "runs" / name)]


def test_cached_reference_losses(folder, tmp_path, monkeypatch):
    """The first time they are what an online run computes; later they are found, without a reference in memory."""
    reference = tmp_path / "reference"
    shutil.copytree(folder / "runs/reference/model", reference)
    files = lambda: len(list((folder / "tokens").glob("*.f32")))
    forwards = []

    def counted(*arguments):
        forwards.append(1)
        return next_token_losses(*arguments)

    monkeypatch.setattr(rho1_wmtp, "next_token_losses", counted)
    online = run_here(folder, "online", reference, cache=False)
    assert files() == 0
    one_epoch = run(folder / "runs/online/config.toml", overrides=["train.max_steps=99", "train.epochs=1"], dry_run=True)
    epoch = int(one_epoch["steps"].split()[0])
    assert 2 <= epoch < 10, "the runs should see tokens a second time"
    forwards.clear()

    first = run_here(folder, "first", reference)
    assert files() == 1
    assert first[:epoch] == online[:epoch]
    for cached, computed in zip(first, online, strict=True):
        assert cached == pytest.approx(computed, rel=1e-4)
    assert epoch < len(forwards) <= 2 * epoch, "later epochs need no reference"
    forwards.clear()

    monkeypatch.setattr(training_run, "load_extra_model", lambda *_: None)  # the model must not even be loaded
    second = run_here(folder, "second", reference)
    assert second == first
    assert not forwards
    monkeypatch.undo()

    # what decides the losses decides the file
    run_here(folder, "other-data", reference, "data.train.max_length=48", "train.max_steps=2")
    assert files() == 2
    run_here(folder, "other-targets", reference, "data.train.learn_prompt=true", "train.max_steps=2")
    assert files() == 3
    run_here(folder, "other-precision", reference, "trainer.reference_precision=bf16", "train.max_steps=2")
    assert files() == 4
    weights = load_file(reference / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, reference / "model.safetensors", {"format": "pt"})
    changed = run_here(folder, "other-reference", reference, "train.max_steps=2")
    assert files() == 5
    assert changed[0][1] != first[0][1]

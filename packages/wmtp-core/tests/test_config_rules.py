"""Rules that must hold between sections."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from wmtp.config.advice import unwise_settings
from wmtp.config.load import load
from wmtp.config.rules import check, check_loaded
from wmtp.errors import ConfigError
from wmtp.plugins import Registry, load_plugins
from wmtp.plugins.components import component
from wmtp.plugins.contract import TrainerConfig


@attrs.frozen(kw_only=True)
class Picky(TrainerConfig):
    type = "picky"
    required_models = ("ref",)
    lo: float = 0.0
    hi: float = 1.0
    of: Any = component("trainers", default=None)

    def check(self) -> Iterable[str]:
        return "hi: a text" if self.hi == 15 else self._problems()

    def _problems(self) -> Iterator[str]:
        if self.lo > self.hi:
            yield "lo: is above hi; lower it"
        if self.hi == 13:
            raise KeyError("thirteen")
        if self.hi == 14:
            yield "is out of luck: never 14"

    def build(self) -> None:
        """Nothing to build."""


@attrs.frozen(kw_only=True)
class Easy(TrainerConfig):
    type = "easy"
    of: Any = component("trainers", default=None)

    def build(self) -> None:
        """Nothing to build."""


INSTALLED = load_plugins()
# as where wmtp-core is installed alone
ALONE = Registry(INSTALLED.plugins, [p for p in INSTALLED.components if p.cls.__module__.startswith("wmtp.")])
REGISTRY = ALONE.with_classes([("trainers", Picky), ("trainers", Easy)])
GOOD = {
    "models": {"base": {"type": "scratch", "vocab_size": 300}},
    "datasets": {"py": {"type": "python-source"}},
    "trainer": {"type": "easy"},
}


def problems(changes, *sets):
    loaded = load([GOOD, changes], sets, registry=REGISTRY)
    with pytest.raises(ConfigError) as caught:
        check_loaded(loaded)
    with pytest.raises(ConfigError):
        check(loaded.config, REGISTRY)
    return list(caught.value.problems)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/nowhere/runs")
    for name, said in {
        "file/runs": f"is inside of {tmp_path}/file, which is a file",
        "link": "is a link to /nowhere/runs, which is not there",
        "link/a": f"is inside of {tmp_path}/link, which is a link to /nowhere/runs, which is not there",
    }.items():
        (problem,) = problems({"run": {"output_dir": f"{tmp_path}/{name}"}})
        assert problem == f"run.output_dir: '{tmp_path}/{name}' {said}; write the path of a folder"
    (tmp_path / "here").symlink_to(tmp_path)
    check_loaded(load([GOOD, {"run": {"output_dir": f"{tmp_path}/here/new/runs"}}], registry=REGISTRY))


def test_a_good_config_passes():
    check_loaded(load(GOOD, registry=REGISTRY))


@pytest.mark.parametrize(
    ("target", "held"),
    [
        ("runs", "run.output_dir"),
        ("here", "run.output_dir, datasets.own.uri, checkpoints.uri"),
        ("./here/data", "datasets.own.uri"),
        ("link", "datasets.own.uri"),
        ("kept", "checkpoints.uri"),
        (".", "run.output_dir, datasets.own.uri, checkpoints.uri, the current folder"),
        ("/", "run.output_dir, datasets.own.uri, checkpoints.uri, storage.cache_dir, the current folder, the home folder"),
    ],
)
def test_a_push_that_would_replace_what_is_needed(tmp_path, monkeypatch, target, held):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "data").mkdir(parents=True)
    (tmp_path / "here" / "data" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "link").symlink_to("here/data")
    prefix = "here/" if target == "here" else ""
    run = {"output_dir": f"{prefix}runs", "push_to": target}
    own = {"type": "jsonl", "uri": "here/data/a.jsonl"}
    table = {"run": run, "datasets": {"own": own}, "checkpoints": {"uri": f"{prefix}kept"}}
    (problem,) = problems(table)
    assert problem == f"run.push_to: '{target}' is replaced whole, and holds {held}; write a new folder's name"
    check_loaded(load([GOOD, table, {"run": {"push_to": "./runs/pushed"}}], registry=REGISTRY))
    (problem,) = problems({"run": {"push_to": "./here/data/a.jsonl"}})
    assert problem.startswith("run.push_to: './here/data/a.jsonl' is a file")


WEIGHTS = {"models": {"base": {"heads": {"horizon": 3}}}}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["run.name=a/b"], "--set run.name: 'a/b' cannot name a folder"),
        (["run.name=.."], "--set run.name: '..' cannot name a folder"),
        (["run.name="], "--set run.name: '' cannot name a folder"),
        (['datasets."".type=python-source'], "datasets.\"\": the table needs a name that can be printed; write one"),
        (['datasets."a.b: c".type=humaneval'], "datasets.\"a.b: c\": 'humaneval' is for evaluation only"),
        (['data.train.sources=["x.y"]'], 'data.train.sources: there is no [datasets."x.y"]; there are: py'),
        (['datasets." ".type=python-source'], "datasets.\" \": the table needs a name that can be printed; write one"),
        (["run.output_dir=s3://b/x"], "--set run.output_dir: 's3://b/x' is not on this machine"),
        (["checkpoints.uri=/etc/hostname"], "--set checkpoints.uri: '/etc/hostname' is a file; write the path of a folder"),
        (["models.reff.type=scratch", "models.reff.vocab_size=3"], "models.reff: unknown model; did you mean 'ref'?"),
        (["models.zzz.type=scratch", "models.zzz.vocab_size=3"], "models.zzz: unknown model; models: base, ref, rm, critic"),
        (
            ["models.ref={type = 'scratch', vocab_size = 3, heads = {}}"],
            "models.ref.heads: only models.base has heads; remove this table",
        ),
        (["trainer.type=picky"], "--set trainer.type: models.ref: required by the trainer 'picky', and missing"),
        (["trainer.of.type=picky"], "models.ref: required by the trainer 'picky', and missing"),
        (["models.base.heads.head_weights=[1, 1]"], "models.base.heads.head_weights: has 2 weights, but horizon = 4"),
        (["models.base.heads.head_weights=[0, 0, 0, 0]"], "head_weights: are all 0, so nothing would be learned"),
        (
            ["models.base.heads={head_weights = [1, 1, 1, 1], decay = 0.5}"],
            "models.base.heads.decay: conflicts with head_weights; remove one of them",
        ),
        (["models.base.heads.horizon=9", "data.train.max_length=9"], "horizon: 9 must be less than data.train.max_length = 9"),
        (["models.base.heads.warmup_steps=6", "train.max_steps=5"], "warmup_steps: 6 must be at most train.max_steps = 5"),
        (["data.train.micro_batch_size=9"], "micro_batch_size: 9 must be at most data.train.batch_size = 8"),
        (["data.train.sources=[pyy]"], "--set data.train.sources=[pyy]: the value is not TOML"),
        (['data.train.sources=["pyy"]'], "data.train.sources: there is no [datasets.pyy]"),
        (['data.eval.sources=["py"]', 'data.train.sources=["py"]'], "data.eval.sources: 'py' is training data too"),
        (["data.eval={}"], "--set data.eval: has neither sources nor holdout"),
        (["schedule.warmup_steps=5", "schedule.warmup_ratio=0.1"], "warmup_ratio: conflicts with warmup_steps"),
        (["schedule.warmup_steps=6", "train.max_steps=5"], "schedule.warmup_steps: 6 must be at most train.max_steps = 5"),
        (["train.early_stopping={}"], "train.early_stopping.metric: 'eval/loss' is measured on [data.eval], which is missing"),
        (["train.early_stopping={}", "data.eval.holdout=0.1"], "'eval/loss' needs train.eval_interval"),
        (["train.eval_interval=3"], "train.eval_interval: there is nothing to measure on: [data.eval] is missing"),
        (["datasets.h={type = 'humaneval', uri = '.'}"], "'humaneval' is for evaluation only"),
        (["datasets.j={type = 'jsonl', uri = 'no/such.jsonl'}"], "datasets.j.uri: 'no/such.jsonl' (that is /"),
        (["datasets.j={type = 'jsonl', uri = 's3://b/x'}"], "no installed plugin serves s3:// URIs; installed: file://"),
        (["datasets.j={type = 'jsonl', uri = 'ftpx://b/x'}"], "no installed plugin serves ftpx:// URIs"),
        (["checkpoints.uri=s3://b/x"], "--set checkpoints.uri: 's3://b/x': no installed plugin serves s3://"),
        (["tokenizer={type = 'hf-transformers', uri = 'nowhere'}"], "tokenizer.uri: 'nowhere' (that is /"),
        (["tracker.tracking_uri=s3://bucket/mlruns"], "--set tracker.tracking_uri: 's3://bucket/mlruns': no installed plugin"),
        (["tracker.tracking_uri=package://x/mlruns"], "--set tracker.tracking_uri: package:// keeps no runs; write an object"),
        (["datasets.j={type = 'jsonl', uri = 'https://me:pw@host/x'}"], "datasets.j.uri: looks like a secret"),
        (["run.tags=['hf_abcdefghijklmnopqrstuvwx']"], "run.tags.0: looks like a secret"),
        (["trainer={type = 'picky', lo = 2}"], "trainer.lo: is above hi; lower it"),
        (["trainer={type = 'picky', hi = 15}"], "check() of 'picky' in Picky failed: TypeError: it must give one line"),
        (["trainer={type = 'picky', hi = 13}"], "Picky._problems raised KeyError: 'thirteen' (/"),
        (["trainer={type = 'picky', hi = 14}"], "trainer: is out of luck: never 14"),
        (["trainer={type = 'easy', of = {type = 'picky', lo = 2}}"], "trainer.of.lo: is above hi; lower it"),
    ],
)  # fmt: skip
def test_each_rule(sets, message):
    try:
        found = problems({}, *sets)
    except ConfigError as error:
        found = list(error.problems)
    assert any(message in line for line in found), found


def test_a_secret_is_never_repeated():
    assert "pw" not in " ".join(problems({"datasets": {"j": {"type": "jsonl", "uri": "https://me:pw@host/x"}}}))


def test_base_is_required():
    loaded = load([GOOD, {"models": {"base": None, "ref": GOOD["models"]["base"]}}], registry=REGISTRY)
    with pytest.raises(ConfigError, match=r"models\.base: required, and missing"):
        check_loaded(loaded)


def test_an_override_of_evaluation_only_is_explicit(tmp_path: Path):
    record = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(record))
    dataset = {"type": "humaneval", "uri": str(tmp_path), "allow_training": True}
    check_loaded(load([GOOD, {"datasets": {"h": dataset}}], registry=REGISTRY))


def test_home_and_file_uris_that_exist_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.jsonl").write_text('{"text": "a"}')
    for uri in ("~/a b.jsonl", f"file://{tmp_path}/a%20b.jsonl"):
        check_loaded(load([GOOD, {"datasets": {"j": {"type": "jsonl", "uri": uri}}}], registry=REGISTRY))


def test_the_line_of_a_rule_that_is_broken(tmp_path: Path):
    path = tmp_path / "a.toml"
    path.write_text("[train]\nmax_steps = 5\n\n[schedule]\n# here\nwarmup_steps = 6\n")
    loaded = load([GOOD, path], registry=REGISTRY)
    with pytest.raises(ConfigError) as caught:
        check_loaded(loaded)
    assert str(caught.value) == f"{path}:6: schedule.warmup_steps: 6 must be at most train.max_steps = 5"


@pytest.mark.parametrize(("lr", "warned"), [(1e308, True), (10, True), (1.0, False)])
def test_a_learning_rate_that_no_model_survives_is_warned_of(lr, warned):
    config = load([GOOD, {"optimizer": {"lr": lr}}], registry=REGISTRY).config
    assert any(f"optimizer.lr: {lr:g} is more than" in said for said in unwise_settings(config)) == warned

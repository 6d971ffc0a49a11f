"""Stages: when one ends early, what each learns from, how fast its modules learn, and that a resume changes none of it."""

import json
import shutil

import attrs
import numpy as np
import pytest
import torch
from one_step import Baseline, Valued, gradients, make_batch, make_model, step_loss
from safetensors.torch import load_file
from torch import nn

import wmtp
from wmtp.config.schema import EarlyStoppingConfig
from wmtp.errors import ConfigError, PluginError, WMTPError
from wmtp.plugins.contract import TrainerConfig
from wmtp.trainers import Stage, Trainer
from wmtp.training.stages import StageBatches, StagePlan, apply_stage
from wmtp.training.trainer_modules import UntrainedModules

THREE = [Stage(name="a", steps=4, until=EarlyStoppingConfig(metric="a")), Stage(name="b", steps=3), Stage(name="c")]


def plan(stages=THREE, *, total=20, warmup=0):
    return StagePlan.make(stages, warmup_steps=warmup, total_steps=total, trainer_name="trainer 'mine'")


def test_what_follows_a_stage_that_ends_early_starts_sooner():
    whole = plan(warmup=2)
    assert whole.ends == (2, 6, 9, 20)
    ended = whole.ended(4)
    assert ended.ends == (2, 4, 7, 20)
    assert [ended.at(step).name for step in range(8)] == ["head-warmup"] * 2 + ["a"] * 2 + ["b"] * 3 + ["c"]
    assert ended.ended(5).ends == (2, 4, 5, 20)


def test_a_warm_up_may_be_all_of_a_run_where_one_stage_is_left_out_by_it():
    alone = plan([Stage()], total=5, warmup=5)
    assert (alone.ends, [stage.name for stage in alone.stages]) == ((5,), ["head-warmup"])
    with pytest.raises(ConfigError, match=r"the run has 20 steps, which end before stage 'a': 'head-warmup' 20; make"):
        plan(warmup=20)


def test_the_last_stage_ends_with_the_run():
    with pytest.raises(PluginError, match=r"trainer 'mine': the last stage ends with the run, not by a metric"):
        plan([Stage(until=EarlyStoppingConfig())])


def test_stages_that_share_documents_go_on_in_one_order():
    first, second = object(), object()
    batches = StageBatches(plan(), [first, second, first])
    at = [batches.locate(step) for step in range(9)]
    assert at == [(first, 0), (first, 1), (first, 2), (first, 3), (second, 0), (second, 1), (second, 2), (first, 4), (first, 5)]
    batches.end_stage(2)
    assert [batches.locate(step) for step in (1, 2, 4, 5)] == [(first, 1), (second, 0), (second, 2), (first, 2)]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (Stage(name="a"), "stages returned Stage(name='a'"),
        (["a"], "stages returned ['a']; it must be a list of wmtp.Stage"),
        (None, "stages returned None; it must be a list of wmtp.Stage"),
        ([Stage(name="a", steps="3")], "stage 'a' has steps = '3'; write a whole number, or None"),
        ([Stage(name="a", steps=1.5), Stage()], "stage 'a' has steps = 1.5; write a whole number, or None"),
        ([Stage(name="a", frozen="model")], "stage 'a' has frozen = 'model'; write a set of names"),
        ([Stage(name="a", frozen=["model"])], "stage 'a' has frozen = ['model']; write a set of names"),
    ],
)
def test_what_are_no_stages_is_said(stages, said):
    with pytest.raises(PluginError) as error:
        StagePlan.make(stages, warmup_steps=0, total_steps=3, trainer_name="trainer 'mine'")
    assert str(error.value).startswith(f"trainer 'mine': {said}")


def test_a_stage_has_no_negative_length():
    with pytest.raises(PluginError, match="stage 'a' has a negative number of steps"):
        StagePlan.make([Stage(name="a", steps=-3), Stage()], warmup_steps=0, total_steps=5, trainer_name="x")


# --- what learns in a stage


def test_warm_up_teaches_the_heads_and_nothing_else():
    model, batch = make_model(), make_batch(packed=False)
    plan = StagePlan.make([Stage()], warmup_steps=2, total_steps=5, trainer_name="x")
    assert [plan.at(step).name for step in range(5)] == ["head-warmup"] * 2 + ["train"] * 3
    apply_stage(plan.at(0), model, {}, "x")
    _, found = gradients(model, Baseline(), batch)
    assert found
    assert all(name.startswith("extra_heads.") for name in found)
    apply_stage(plan.at(2), model, {}, "x")
    _, found = gradients(model, Baseline(), batch)
    assert any(name.startswith("base.") for name in found)


def test_a_stage_without_model_loss_teaches_only_the_modules():
    model, batch, trainer = make_model(), make_batch(packed=False), Valued()
    stage = Stage(name="value", frozen=frozenset({"model", "heads"}), model_loss=False)
    step_loss(model, trainer)
    apply_stage(stage, model, trainer.modules(), "x")
    trainer.setup = lambda setup: None
    output, found = gradients(model, trainer, batch, stage=stage)
    assert set(found) == {"value.weight", "value.bias"}
    torch.testing.assert_close(output.loss.double(), output.metrics["auxiliary/value"].double())


# --- runs


class TwoStages(Trainer):
    """Learns a value from odd documents, in a stage that ends when a made-up metric stands still; then from even ones."""

    def __init__(self, config):
        self.config = config
        self.count = 0

    def setup(self, setup):
        torch.manual_seed(setup.seed)
        self.value = nn.Linear(setup.hidden_size, 1)

    def modules(self):
        return {"value": self.value}

    def check_data(self, data):
        return [f"datasets.{name}: {self.config.problem}" for name in data.names if self.config.problem]

    def stages(self):
        until = EarlyStoppingConfig(metric="made-up", patience=2)
        first = Stage(name="value", steps=12, frozen=frozenset({"model", "heads"}), model_loss=False, until=until)
        return (first, Stage(name="train", frozen=frozenset({"value"})))

    def groups(self, data, stage):
        if self.config.groups == "none":
            return None
        if self.config.groups == "bad":
            return np.zeros(3)
        if self.config.groups == "empty":
            return np.full(len(data), -1)
        wanted = 1 if stage.name == "value" else 0
        return np.where(data.indices % 2 == wanted, data.indices, -1)

    def learning_rates(self):
        return {"value": 0.5}

    def observe(self, view):
        return {"value": self.value(view.trunk.detach()).squeeze(-1)}

    def auxiliary_losses(self, view):
        self.odd = sum(document.index % 2 for document in view.batch.documents) / len(view.batch.documents)
        if view.stage != "value":
            return {}
        self.count += 1
        scale = float("inf") if self.count == self.config.explodes else 1.0
        return {"value": scale * (view.observations["value"][view.batch.loss_mask] - 1).square().mean()}

    def metrics(self):
        return {"made-up": max(1.0, 5.0 - self.count), "odd": self.odd}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@attrs.frozen(kw_only=True)
class TwoStagesConfig(TrainerConfig):
    type = "two-stages"
    groups: str = "halves"
    problem: str = ""
    explodes: int = 0

    def build(self):
        return TwoStages(self)


@pytest.fixture
def plain_config(tmp_path):
    data = tmp_path / "code.jsonl"
    data.write_text("".join(json.dumps({"id": f"d{i}", "text": f"x = {i} + {i * i}"}) + "\n" for i in range(40)))

    def make(*, save_interval=3, log_interval=1):
        return {
            "run": {"output_dir": str(tmp_path / "runs")},
            "models": {
                "base": {
                    "type": "scratch", "vocab_size": 258, "hidden_size": 16, "layers": 2, "attention_heads": 2,
                    "intermediate_size": 16, "max_positions": 32, "heads": {"horizon": 2},
                }
            },
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "jsonl", "uri": str(data)}},
            "data": {"train": {"max_length": 24, "batch_size": 4, "micro_batch_size": 2, "packing": False}},
            "trainer": {"type": "baseline-mtp"},
            "optimizer": {"type": "adamw", "lr": 1e-3},
            "schedule": {"type": "constant"},
            "train": {"max_steps": 14, "log_interval": log_interval},
            "checkpoints": {"save_interval": save_interval, "keep_last": 0},
            "tracker": {"type": "jsonl"},
        }  # fmt: skip

    return make


@pytest.fixture
def make_config(plain_config):
    def make(*, save_interval=3, log_interval=1, **trainer):
        plain = wmtp.load_config(plain_config(save_interval=save_interval, log_interval=log_interval))
        return attrs.evolve(plain, trainer=TwoStagesConfig(**trainer))

    return make


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_ends_by_its_metric_and_each_stage_has_its_documents(make_config):
    result = wmtp.run(make_config(), run_name="whole")
    lines = lines_of(result.run_dir)
    # the metric stands at 1 from step 4 on: steps 5 and 6 make no progress, and step 7 was under way
    assert [line["stage"] for line in lines] == ["value"] * 7 + ["train"] * 7
    assert [line["odd"] for line in lines] == [1.0] * 7 + [0.0] * 7
    assert [line["epoch"] for line in lines] == [0.0] * 5 + [1.0] * 2 + [0.0] * 5 + [1.0] * 2


@pytest.mark.parametrize("kept", [3, 5, 6, 9])
def test_a_resume_ends_the_stage_where_the_whole_run_did(make_config, kept):
    """Killed after step 3, in the middle of the patience, when the end is decided but not reached, and after the stage."""
    parts = wmtp.run(make_config(save_interval=1), run_name="parts").run_dir
    whole = parts.with_name("whole")
    shutil.copytree(parts, whole)
    shutil.rmtree(parts / "model")
    for folder in (parts / "checkpoints").iterdir():
        if int(folder.name.partition("-")[2]) > kept:
            shutil.rmtree(folder)
    wmtp.run(make_config(save_interval=1), run_name="parts", resume="auto")
    strip = lambda lines: [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory_gib")} for line in lines
    ]
    assert strip(lines_of(parts)) == strip(lines_of(whole))
    left, right = load_file(whole / "model/model.safetensors"), load_file(parts / "model/model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_where_a_stage_ends_does_not_depend_on_what_is_logged_or_saved(make_config):
    runs = [
        wmtp.run(make_config(save_interval=save, log_interval=log), run_name=f"{save}-{log}").run_dir
        for save, log in ((3, 1), (1, 7), (14, 2))
    ]
    first, *others = [load_file(run / "model/model.safetensors") for run in runs]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_module_learns_at_its_own_rate_and_only_in_its_stage(make_config):
    run = wmtp.run(make_config(), run_name="rates").run_dir
    states = {step: torch.load(run / f"checkpoints/step-{step}/state.pt", weights_only=True) for step in (3, 6, 9, 12)}
    rates = {group["lr"] for group in states[3]["optimizer"]["param_groups"]}
    assert rates == {1e-3, 0.5}
    weights = {step: state["modules"]["value"]["weight"] for step, state in states.items()}
    assert not torch.equal(weights[3], weights[6])
    assert torch.equal(weights[9], weights[12])


def test_checkpoints_that_cannot_be_written_are_found_before_the_training(make_config, tmp_path):
    (tmp_path / "file").touch()
    config = make_config()
    config = attrs.evolve(config, checkpoints=attrs.evolve(config.checkpoints, uri=str(tmp_path / "file/inside")))
    with pytest.raises(ConfigError, match=r"^checkpoints.uri: '.*file/inside' is inside of .*file, which is a file"):
        wmtp.run(config, run_name="x")
    assert not (tmp_path / "runs/x/metrics.jsonl").exists()


def test_problems_of_the_data_come_before_the_model(make_config):
    with pytest.raises(ConfigError, match=r"^datasets.code: has no labels; add some$"):
        wmtp.run(make_config(problem="has no labels; add some"), run_name="x")
    with pytest.raises(ConfigError, match=r"^datasets.code: has no labels; add some$"):
        wmtp.run(make_config(problem="has no labels; add some"), dry_run=True)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("bad", r"groups returned float64 of shape \[3\] for stage 'value'"),
        ("empty", "groups leaves no document to stage 'value'"),
    ],
)
def test_groups_of_the_wrong_form_name_the_trainer(make_config, groups, words):
    with pytest.raises(PluginError, match=r"trainer 'two-stages'.*" + words):
        wmtp.run(make_config(groups=groups), run_name="x")


def test_without_groups_the_order_is_that_of_any_other_trainer(make_config):
    config = make_config(groups="none")
    result = wmtp.run(config, run_name="x")
    assert [line["epoch"] for line in lines_of(result.run_dir)] == [0.0] * 10 + [1.0] * 4


def test_a_loss_that_explodes_is_named(make_config):
    with pytest.raises(WMTPError, match=r"step 3: the loss is inf .*; auxiliary/value of trainer 'two-stages'.* is inf;"):
        wmtp.run(make_config(explodes=3), run_name="x")


def test_a_run_of_warm_up_alone_leaves_the_model_as_it_is_until_it_is_made_longer(plain_config):
    facts = plain_config()
    source = wmtp.run(facts, overrides=["models.base.heads.horizon=1", "train.max_steps=1"], run_name="source").model
    facts["models"]["base"] = {"type": "hf", "uri": str(source), "heads": {"horizon": 2, "warmup_steps": 2}}
    del facts["tokenizer"]
    run = wmtp.run(facts, overrides=["train.max_steps=2"], run_name="alone")
    before, after = load_file(source / "model.safetensors"), load_file(run.model / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    longer = wmtp.run(resume=run.run_dir, overrides=["train.max_steps=4"])
    assert [line["stage"] for line in lines_of(run.run_dir)] == ["head-warmup"] * 2 + ["train"] * 2
    after = load_file(longer.model / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("stage", "named"),
    [(Stage(name="a"), True), (Stage(name="a", frozen=frozenset({"idle"})), False), (Stage(name="head-warmup"), False)],
)
def test_a_module_that_no_gradient_reaches_is_named_once(caplog, stage, named):
    modules = {name: torch.nn.Linear(1, 1) for name in ("late", "idle")} | {"empty": torch.nn.Identity()}
    watch = UntrainedModules(modules, stage, "trainer 'mine'")
    for step in range(1, 30):
        if step == 15:
            modules["late"](torch.ones(1)).backward()
        watch.after_backward(last=False)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == named
    if named:
        assert said[0].startswith(
            "trainer 'mine': stage 'a': no gradient has reached the module 'idle' in 20 steps, so it does"
        )
    short = UntrainedModules({"idle": torch.nn.Linear(1, 1)}, Stage(), "x")
    short.after_backward(last=True)
    assert "no gradient has reached the module 'idle' in 1 steps" in caplog.records[-1].getMessage()
    unlooked = UntrainedModules({"idle": torch.nn.Linear(1, 1)}, Stage(), "x")
    unlooked.end()
    assert len(caplog.records) == named + 1


def test_a_module_of_a_short_stage_is_named_when_it_ends(caplog):
    watch = UntrainedModules({"idle": torch.nn.Linear(1, 1)}, Stage(name="a"), "x")
    for _ in range(3):
        watch.after_backward(last=False)
    watch.end()
    watch.end()
    [record] = caplog.records
    assert "stage 'a': no gradient has reached the module 'idle' in 3 steps" in record.getMessage()

"""Study files: what is wrong with them, with its line, and which runs they stand for."""

import json
from pathlib import Path

import attrs
import pytest
import tomli
import tomli_w
from tiny_recipe import tiny_recipe

from wmtp.errors import ConfigError
from wmtp.studies.config import ArmConfig, ComparisonConfig, StudySection, load_study
from wmtp.studies.plan import make_plan

STUDY = """
[study]
name = "small"
recipe = "recipe.toml"
seeds = [0, 1]
baseline = "baseline"
metrics = ["eval/loss"]

[arms.reference]
seeds = [7]
compared = false
set.models.base.heads.horizon = 1

[arms.baseline]

[arms.rho1.set]
trainer.type = "rho1-wmtp"
models.ref = { type = "hf", uri = "${arm:reference}" }
"""

MEASURED = {"train": {"max_length": 32, "batch_size": 2}, "eval": {"holdout": 0.5}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = json.dumps({"prompt": "def f():", "completion": " return 1"})
    (tmp_path / "code.jsonl").write_text(f"{line}\n")
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tiny_recipe(data=MEASURED)))
    return tmp_path


def plan(folder, text=STUDY, overrides=()):
    (folder / "study.toml").write_text(text)
    return make_plan(load_study("study.toml"), [], overrides)


def problems(folder, text):
    with pytest.raises(ConfigError) as error:
        plan(folder, text)
    return error.value.problems


def test_keys_that_the_type_of_an_arm_drops_are_named_with_its_line(folder):
    recipe = tiny_recipe(trainer={"type": "focal", "gamma": 1.0}, data=MEASURED)
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    (warning,) = plan(folder).warnings
    assert warning.startswith("study.toml:17: trainer.type: 'rho1-wmtp' in place of 'focal' drops gamma; set it again where")


def test_arms_of_equal_settings_are_named_but_not_one_that_is_trained_for_others(folder):
    (warning,) = plan(folder, f"{STUDY}[arms.again]\n[arms.aside]\ncompared = false\n").warnings
    assert warning.startswith("the arms baseline and again have equal settings")


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (["eval/los"], "'eval/los' is no metric of [data.eval]; did you mean 'eval/loss'?"),
        (["eval/loss/head_3"], "'eval/loss/head_3' is no metric of [data.eval]; did you mean 'eval/loss/head_2'?"),
        (["eval/qqqqqqqq*"], "'eval/qqqqqqqq*' is no metric of [data.eval]; there are 'eval/loss', "),
    ],
)
def test_a_metric_of_the_evaluation_that_no_arm_has_is_said_before_a_run(folder, metrics, said):
    text = STUDY.replace('["eval/loss"]', json.dumps(metrics)) + "[set.models.base.heads]\nhorizon = 2\n"
    (problem,) = problems(folder, text)
    assert problem.startswith(f"study.toml:7: study.metrics: {said}")
    compared = STUDY + f'[[comparisons]]\narm = "rho1"\nmetric = "{metrics[0]}"\n[set.models.base.heads]\nhorizon = 2\n'
    (problem,) = problems(folder, compared)
    assert f"comparisons.0.metric: {said}" in problem


def test_without_evaluation_data_no_arm_has_its_metrics(folder):
    (folder / "recipe.toml").write_text(tomli_w.dumps(tiny_recipe()))
    (problem,) = problems(folder, STUDY)
    assert problem == "study.toml:7: study.metrics: 'eval/loss' is measured on [data.eval], which is missing; add it"
    plan(folder, STUDY + "[arms.measured.set.data.eval]\nholdout = 0.5\n")  # one arm has them


def test_metrics_that_are_likely_to_be_none_are_warned_of(folder):
    names = ["eval/loss/*", "eval/acceptance/head_2", "critic/value", "loss", "evl/loss", "perplexity/head_1"]
    text = STUDY.replace('["eval/loss"]', json.dumps(names))
    assert plan(folder, text).warnings == [
        "study.metrics: 'evl/loss' is no metric that is known before a run is done; did you mean 'eval/loss'?",
        "study.metrics: 'perplexity/head_1': no compared arm has the evaluator 'perplexity'; add it to [[eval]]",
    ]
    assert len(plan(folder, text + '[[set.eval]]\ntype = "perplexity"\n').warnings) == 1


def test_runs_are_every_arm_with_every_seed_after_what_they_need(folder):
    found = plan(folder)
    assert [(run.arm, run.seed) for run in found.runs] == [
        ("reference", 7), ("baseline", 0), ("rho1", 0), ("baseline", 1), ("rho1", 1)
    ]  # fmt: skip
    by_arm = {(run.arm, run.seed): run for run in found.runs}
    reference, rho1 = by_arm["reference", 7], by_arm["rho1", 1]
    assert rho1.needs == (reference.name,)
    assert rho1.config.models["ref"].loader.uri == str(folder / "studies" / "small" / "runs" / reference.name / "model")
    assert rho1.config.run.seed == 1
    assert rho1.config.run.name == rho1.name
    assert reference.config.models["base"].heads.horizon == 1


def test_a_key_counts_what_decides_the_result_and_nothing_else(folder):
    before = {(run.arm, run.seed): run.key for run in plan(folder).runs}
    elsewhere = STUDY.replace('name = "small"', 'name = "other"\noutput_dir = "there"\njobs = 3')
    same = plan(folder, elsewhere, ["report.samples=0", "devices.threads=1", "data.train.micro_batch_size=2"])
    assert {(run.arm, run.seed): run.key for run in same.runs} == before
    other = plan(folder, STUDY.replace("heads.horizon = 1", "heads.horizon = 2"))
    changed = {arm for (arm, seed), key in before.items() if key not in {run.key for run in other.runs}}
    assert changed == {"reference", "rho1"}  # the one that was edited, and the one that is trained against it


def test_keep_models_false_writes_no_last_checkpoint_and_keeps_the_keys(folder):
    kept, removed = plan(folder), plan(folder, STUDY.replace("seeds = [0, 1]", "seeds = [0, 1]\nkeep_models = false"))
    assert [run.key for run in kept.runs] == [run.key for run in removed.runs]
    assert {run.config.checkpoints.save_final for run in removed.runs} == {False}


def test_a_grid_multiplies_arms_and_compares_at_each_of_its_points(folder):
    grid = '[grid]\n"optimizer.lr" = [1e-3, 2e-3]\n[[comparisons]]\narm = "rho1"\n'
    found = plan(folder, STUDY.replace("compared = false", "compared = false\ngrid = false") + grid)
    assert {run.config.optimizer.lr for run in found.runs if run.arm.startswith("rho1")} == {1e-3, 2e-3}
    assert {arm.name for arm in found.arms} == {
        "reference", *(f"{name} optimizer.lr={lr}" for name in ("baseline", "rho1") for lr in (0.001, 0.002))
    }  # fmt: skip
    assert [(arm.name, to.name, metric) for arm, to, metric in found.comparisons] == [
        (f"rho1 optimizer.lr={lr}", f"baseline optimizer.lr={lr}", "eval/loss") for lr in (0.001, 0.002)
    ]


def test_an_override_of_the_grid_is_refused_and_one_of_an_arm_is_said(folder):
    grid = '[grid]\n"optimizer.lr" = [1e-3, 2e-3]\n'
    without = STUDY.replace("compared = false", "compared = false\ngrid = false")
    with pytest.raises(ConfigError) as error:
        plan(folder, without + grid, ["train.max_steps=2", "optimizer.lr=1e-4"])
    (problem,) = error.value.problems
    assert problem.startswith("--set optimizer.lr: the grid of this study gives optimizer.lr to each run; ")
    with pytest.raises(ConfigError, match=r"--set run\.seed: the study gives this to each run; write study\.seeds"):
        plan(folder, STUDY, ["run.seed=3"])
    said = plan(folder, STUDY, ["train.max_steps=2", "models.base.heads.horizon=2"]).warnings
    assert said == ["--set models.base.heads.horizon: takes the place of what the arm reference set"]


def test_some_arms_and_seeds_bring_what_they_need(folder):
    found = plan(folder)
    assert [(run.arm, run.seed) for run in found.chosen(["rho1"], [1])] == [("reference", 7), ("rho1", 1)]
    with pytest.raises(ConfigError) as error:
        found.chosen(["rho"], [9])
    assert error.value.problems == (
        "--arms: there is no arm 'rho'; did you mean 'rho1'?", "--seeds: no arm has the seed 9"
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        found.chosen([], [])
    assert [line.partition(";")[0] for line in error.value.problems] == ["--arms: is empty", "--seeds: is empty"]


def edited(old, new):
    assert old in STUDY, old
    return STUDY.replace(old, new)


ARM = "study.toml:18: arms.rho1.set.models.ref.uri: "
MISTAKES = [
    (edited("baseline = ", "jbos = 2\nbaseline = "), "study.toml:6: study.jbos: unknown key; did you mean 'jobs'?"),
    (
        edited('"baseline"\nm', '"basline"\nm'),
        "study.toml:6: study.baseline: there is no arm 'basline'; did you mean 'baseline'?",
    ),
    (edited('"baseline"\nm', '"reference"\nm'), "study.toml:6: study.baseline: the arm 'reference' has compared = false"),
    (edited("seeds = [0, 1]", "seeds = [0, 0]"), "study.toml:5: study.seeds: "),
    (edited("seeds = [0, 1]", "seeds = []"), "study.toml:5: study.seeds: "),
    (edited('"small"', '"../x"'), "study.toml:3: study.name: '../x' cannot name a folder"),
    (f"{STUDY}[arms.Rho1]\n", "study.toml:19: arms.Rho1: two arms of one name, 'rho1' and 'Rho1'"),
    (f"{STUDY}[arms.baseline]\n", "study.toml:19: this is not TOML: Cannot declare ('arms', 'baseline') twice"),
    (f"{STUDY}[arms.a.set]\ntrainer.tpye = 1\n", "study.toml:20: trainer.tpye: unknown key"),
    (
        f"{STUDY}[arms.a]\ntrainer.type = 'dft'\n",
        "study.toml:20: arms.a.trainer: a key of the arm's runs; write it in [arms.a.set]",
    ),
    (edited('recipe = "recipe.toml"', "jobs = 1"), "study.recipe: names no recipe, so [set] is the whole one"),
    (
        f"{STUDY}[arms.a.set]\nrun.seed = 1\n",
        "study.toml:20: arms.a.set.run.seed: the study gives this to each run; write study.seeds",
    ),
    (f"{STUDY}[arms.a.set]\ncheckpoints.uri = 'x'\n", "study.toml:20: checkpoints.uri: one place for the models of all runs"),
    (edited("{arm:reference}", "{arm:refrence}"), f"{ARM}'refrence' is no arm of this study; did you mean 'reference'?"),
    (edited("{arm:reference}", "{arm:rho1}"), f"{ARM}'rho1' is the arm itself"),
    (edited("{arm:reference}", "{arm:reference}/x"), ARM + "${arm:reference} is a whole model"),
    (edited("seeds = [7]", "seeds = [7, 0]"), f"{ARM}the arm 'reference' has no run with seed 1"),
    (f"{STUDY}[[comparisons]]\narm = 'rho'\n", "study.toml:20: comparisons.0.arm: there is no arm 'rho'; did you mean 'rho1'?"),
    (f"{STUDY}[[comparisons]]\narm = 'baseline'\n", "study.toml:19: comparisons.0: compares the arm 'baseline' with itself"),
    (
        f"{STUDY}[[comparisons]]\narm = 'rho1'\n[[comparisons]]\narm = 'baseline'\nto = 'rho1'\n",
        "study.toml:21: comparisons.1: compares the same as comparisons.0; remove one of them",
    ),
    (STUDY + "[[comparisons]]\narm = 'rho1'\n" * 5, "study.toml:19: comparisons: "),
    (f"{STUDY}[grid]\n'optimizer.lr' = 1\n", 'study.toml:20: grid."optimizer.lr": must be a list of values, each once'),
    (f"{STUDY}[grid]\noptimizer.lrr = [1, 2]\n", "study.toml:20: optimizer.lrr: unknown key"),
    (
        f"{STUDY}[arms.a.set]\noptimizer.lr = 1e-4\n[grid]\n'optimizer.lr' = [1e-3, 2e-3]\n",
        "study.toml:20: arms.a.set.optimizer.lr: the grid gives optimizer.lr to each run of this arm; leave one of them out",
    ),
    (
        f"{STUDY}[arms.a.set]\ntrainer.gamma = 1.0\n[grid]\ntrainer = [{{ type = 'focal' }}, {{ type = 'dft' }}]\n",
        "study.toml:20: arms.a.set.trainer.gamma: the grid gives trainer to each run",
    ),
    (edited('"${arm:reference}" }', '"nowhere" }'), "study.toml:18: models.ref.uri: "),
    (edited('"small"', '"${env:WMTP_NO}"'), "study.toml:3: study.name: environment variable 'WMTP_NO' is not set"),
]


@pytest.mark.parametrize(("text", "wanted"), MISTAKES)
def test_mistakes_are_said_with_their_line(folder, text, wanted):
    found = problems(folder, text)
    assert any(line.startswith(wanted) for line in found), found


def test_mistakes_of_all_arms_are_said_at_once_and_those_of_the_recipe_once(folder):
    found = problems(folder, STUDY + "[arms.a.set]\ntrainer.type = 'foca'\n[arms.b.set]\noptimizer.lr = 'x'\n")
    assert len(found) == 2
    recipe = tomli.loads((folder / "recipe.toml").read_text())
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe | {"train": {"max_stepz": 4}}))
    assert len(problems(folder, STUDY)) == 1


def test_arms_that_need_each_other_are_refused(folder):
    uri = '{ type = "hf", uri = "${arm:%s}" }'
    circle = "".join(
        f'[arms.{one}.set]\ntrainer.type = "rho1-wmtp"\nmodels.ref = {uri % other}\n' for one, other in (("a", "b"), ("b", "a"))
    )
    assert problems(folder, STUDY + circle) == ("arms: a needs b needs a: none of them can be the first",)


def test_the_documentation_names_every_key():
    page = (Path(__file__).parents[3] / "docs" / "study.md").read_text()
    for cls in (StudySection, ArmConfig, ComparisonConfig):
        for attribute in attrs.fields(cls):
            assert f"`{attribute.name}` |" in page, attribute.name

"""The checkpoint that measures best is kept, and is what a run that stops early leaves."""

import json
import logging
import shutil

import pytest
from conftest import write_recipe

import wmtp
from wmtp.cli import main

#: the loss falls, so by mode "max" the first measurement, of step 3, is the best
SETTINGS = [
    "models.base.heads.warmup_steps=0",
    'schedule={type="constant",warmup_steps=0}',
    "train.eval_interval=3",
    "checkpoints.save_interval=2",
]
STOPS = ['train.early_stopping={metric="eval/loss",mode="max",patience=2}']


def run(recipe, name, *overrides, **options):
    return wmtp.run(recipe, run_name=name, overrides=[*SETTINGS, *overrides], **options)


def kept(result):
    return sorted(int(path.name.removeprefix("step-")) for path in (result.run_dir / "checkpoints").iterdir())


def model(result):
    return {path.name: path.read_bytes() for path in result.model.glob("*.safetensors")}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    return model(run(write_recipe(tmp_path_factory.mktemp("three")), "three", "train.max_steps=3"))


def test_where_a_run_stops_early_its_model_is_the_best(recipe, three_steps, caplog):
    with caplog.at_level(logging.INFO, "wmtp"):
        result = run(recipe, "a", *STOPS, "checkpoints.keep_last=1")
    assert (result.status, result.steps) == ("stopped", 9)
    assert kept(result) == [3, 9]
    assert model(result) == three_steps
    lines = [record.getMessage() for record in caplog.records if "model/ is the best" in record.getMessage()]
    assert len(lines) == 1
    assert "not the last of 9 steps: eval/loss" in lines[0]
    assert "at step 3" in lines[0]


def test_a_run_that_comes_to_its_end_keeps_the_best_beside_the_last(recipe, three_steps):
    best = ['checkpoints.best="eval/loss"', 'checkpoints.best_mode="max"', "checkpoints.keep_last=1", "train.max_steps=8"]
    result = run(recipe, "a", *best)
    assert result.status == "finished"
    assert kept(result) == [3, 8]
    assert model(result) != three_steps
    assert kept(run(recipe, "b", "checkpoints.keep_last=1", "train.max_steps=8")) == [8]


@pytest.mark.parametrize(
    "newest",
    [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 4, 8))],  # 3 is itself the best so far
)
def test_a_resumed_run_has_the_same_best(recipe, three_steps, newest):
    result = run(recipe, "a", *STOPS, "checkpoints.keep_last=0")
    assert kept(result) == [2, 3, 4, 6, 8, 9]
    shutil.rmtree(result.model)
    for path in (result.run_dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > newest:
            shutil.rmtree(path)
    again = run(recipe, "a", *STOPS, "checkpoints.keep_last=1", resume="auto")
    assert (again.status, again.steps) == ("stopped", 9)
    assert model(again) == three_steps
    assert kept(again) == [3, 9]


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16-params"])
def test_a_kept_checkpoint_of_a_finished_run_becomes_a_model(recipe, three_steps, tmp_path, precision, capsys):
    best = ['checkpoints.best="eval/loss"', 'checkpoints.best_mode="max"', "checkpoints.keep_last=1", "train.max_steps=8"]
    result = run(recipe, "a", *best, f"devices.precision={precision}")
    for wanted in ("best", "last", 3):
        wmtp.export(result.run_dir, tmp_path / str(wanted), format="wmtp", checkpoint=wanted)
    three, best, last = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("3", "best", "last")
    )
    assert three == best != last == model(result)
    if precision == "fp32":
        assert best == three_steps
    assert "checkpoint of step 3" in (tmp_path / "best/README.md").read_text()
    assert wmtp.load_model(tmp_path / "best").horizon == 3
    for wanted, says in (("5", "--checkpoint 5: there are checkpoints of these steps in"), ("worst", "3, 8")):
        assert main(["export", str(result.run_dir), str(tmp_path / "new"), "--format", "hf", "--checkpoint", wanted]) == 2
        assert says in capsys.readouterr().err
    assert main(["export", str(result.model), str(tmp_path / "hf"), "--format", "hf", "--checkpoint", "best"]) == 0


def test_without_a_best_there_is_none_to_export(recipe, tmp_path):
    result = run(recipe, "a", "train.max_steps=4")
    with pytest.raises(wmtp.ConfigError, match=r"--checkpoint best: the run has remembered no best one .*: 2, 4"):
        wmtp.export(result.run_dir, tmp_path / "x", format="wmtp", checkpoint="best")
    shutil.copytree(result.model, tmp_path / "alone")
    with pytest.raises(wmtp.ConfigError, match="is no run directory, and only runs have checkpoints"):
        wmtp.export(tmp_path / "alone", tmp_path / "x", format="wmtp", checkpoint="best")


def test_a_push_that_fails_at_the_end_leaves_the_run_whole(recipe, monkeypatch):
    def fails(*_):
        raise wmtp.WMTPError("hf://ada/x: the hub at http://127.0.0.1 answers with 503")

    monkeypatch.setattr("wmtp.api._check_push", lambda config: None)
    monkeypatch.setattr("wmtp.exporting.pushing.push_run", fails)
    with pytest.raises(wmtp.WMTPError) as caught:
        run(recipe, "a", "train.max_steps=3", 'run.push_to="hf://ada/x"')
    result = caught.value.result
    assert (result.steps, result.status) == (3, "finished")
    assert str(caught.value) == (
        "run.push_to: hf://ada/x: the hub at http://127.0.0.1 answers with 503; the run is whole, its model is in "
        f"{result.model}; push it with: wmtp push {result.run_dir} hf://ada/x"
    )
    assert caught.value.exit_code == 1
    assert json.loads((result.run_dir / "run.json").read_text())["status"] == "finished"
    assert (result.model / "config.json").is_file()


def test_a_signal_while_the_tracker_closes_pushes_nothing(recipe, monkeypatch, caplog):
    def interrupted(*_):
        raise KeyboardInterrupt

    pushed = []
    monkeypatch.setattr("wmtp.api._check_push", lambda config: None)
    monkeypatch.setattr("wmtp.exporting.pushing.push_run", lambda *words: pushed.append(words))
    monkeypatch.setattr("wmtp.tracking.jsonl.Jsonl.finish", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(recipe, "a", "train.max_steps=3", 'run.push_to="hf://ada/x"')
    result = caught.value.result
    assert (result.status, result.signal, pushed) == ("finished", "SIGINT", [])
    assert "SIGINT: its report and its tracker are waited for no longer; the run is finished" in caplog.text
    assert (
        f"SIGINT: nothing is pushed; the run is whole, its model is in {result.model}; push it with: wmtp push" in caplog.text
    )


def test_a_best_that_was_removed_is_said(recipe, caplog):
    result = run(recipe, "a", *STOPS)
    shutil.rmtree(result.run_dir / "checkpoints/step-3")
    with caplog.at_level(logging.WARNING, "wmtp"):
        run(recipe, "a", *STOPS, resume="auto")
    assert "the checkpoint of the best is gone (eval/loss" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (['checkpoints.best="loss"'], "checkpoints.best: 'loss' is no metric of [data.eval]"),
        (
            ['checkpoints.best="eval/los"'],
            "checkpoints.best: 'eval/los' is no metric of [data.eval]; did you mean 'eval/loss'?",
        ),
        (
            ['checkpoints.best="eval/top1/head_4"'],
            "'eval/top1/head_4' is no metric of [data.eval]; did you mean 'eval/top1/head_",
        ),
        (
            ['train.early_stopping={metric="eval/loss/head_9"}'],
            "train.early_stopping.metric: 'eval/loss/head_9' is no metric of [data.eval]; did you mean 'eval/loss/head_",
        ),
        (['checkpoints.best_mode="max"'], "checkpoints.best_mode: has no effect without checkpoints.best"),
    ],
)
def test_what_cannot_be_tracked_is_refused(recipe, overrides, says):
    with pytest.raises(wmtp.ConfigError) as error:
        wmtp.check(recipe, overrides=overrides)
    assert says in str(error.value)

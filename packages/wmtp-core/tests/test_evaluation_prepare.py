"""Evaluators look for what they need before the training, in runs and dry runs."""

import json

import attrs
import pytest

import wmtp
from wmtp.cli import main
from wmtp.evaluation.consent import allow_code_execution


class Counts(wmtp.Evaluator):
    def prepare(self, fetch):
        if not fetch("words.txt", "eval.uri").read_text():
            raise wmtp.WMTPError("words.txt: holds no word")

    def evaluate(self, measured):
        return {"words": len(measured.fetch("words.txt", "eval.uri").read_text().split())}


@attrs.frozen(kw_only=True)
class Count(wmtp.EvaluatorConfig):
    type = "count"
    broken: bool = False

    def build(self):
        if self.broken:
            raise LookupError("no words")
        return Counts()


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.jsonl").write_text('{"prompt": "one two ", "completion": "three four five six"}\n' * 4)
    (tmp_path / "words.txt").write_text("one two three")
    return wmtp.load_config({
        "models": {"base": {"type": "scratch", "vocab_size": 258, "hidden_size": 8, "layers": 1, "attention_heads": 2}},
        "tokenizer": {"type": "bytes"},
        "datasets": {"code": {"type": "jsonl", "uri": "code.jsonl"}},
        "data": {"train": {"max_length": 32, "batch_size": 2}},
        "trainer": {"type": "baseline-mtp"},
        "train": {"max_steps": 1},
        "devices": {"device": "cpu"},
        "tracker": {"type": "jsonl"},
    })  # fmt: skip


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_evaluator_of_ones_own(config, tmp_path, dry_run):
    def run(evaluator, name):
        return wmtp.run(attrs.evolve(config, eval=[evaluator]), run_name=name, dry_run=dry_run)

    with pytest.raises(wmtp.PluginError, match=r"Count\.build raised LookupError: no words"):
        run(Count(broken=True), "one")
    (tmp_path / "words.txt").write_text("")
    with pytest.raises(wmtp.WMTPError, match="holds no word"):
        run(Count(), "one")
    assert not (tmp_path / "runs/one").exists(), "nothing was trained, so the name is free"
    (tmp_path / "words.txt").write_text("one two three")
    result = run(Count(), "one")
    if not dry_run:
        assert result.metrics["count/words"] == 3


def test_a_run_ends_with_what_was_measured(config, tmp_path, capsys):
    (tmp_path / "r.toml").write_text(
        wmtp.dump_config(attrs.evolve(config, eval=[wmtp.InferenceSpeed(prompt_length=8, new_tokens=2, repeats=1)]))
    )
    assert main(["run", "r.toml", "--run-name", "one"]) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "runs/one/evaluation.json").read_text())
    for name, value in found.items():
        assert f"{name} {value:.4g}" in [" ".join(line.split()) for line in out]


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_problems_to_solve_that_are_damaged(config, tmp_path, capsys, dry_run):
    (tmp_path / "problems.jsonl").write_text(json.dumps({"task_id": 1, "text": "Double."}) + "\n")
    solved = wmtp.PassAtK(dataset="mbpp", uri="problems.jsonl", shots=0, isolation="process")
    (tmp_path / "r.toml").write_text(wmtp.dump_config(attrs.evolve(config, eval=[solved])))
    with allow_code_execution(True):
        code = main(["run", "r.toml", "--run-name", "one", "--allow-code-execution", *dry_run])
    err = capsys.readouterr().err
    assert (code, "problems.jsonl:1" in err, "data.train: " in err) == (2, True, False), err
    assert not (tmp_path / "runs/one").exists()


@pytest.mark.slow  # the harness takes half a minute to start
def test_a_task_that_there_is_not(config, capsys, tmp_path):
    pytest.importorskip("lm_eval")
    asked = wmtp.load_config(attrs.evolve(config), ["eval=[{type = 'lm-eval', tasks = ['helaswag']}]"])
    with pytest.raises(wmtp.WMTPError, match="there is no task 'helaswag'; did you mean 'hellaswag'"):
        wmtp.run(asked, run_name="one")
    assert not (tmp_path / "runs/one").exists()

"""Tasks of lm-evaluation-harness from a folder: local yaml and jsonl files, no network."""

import json
from pathlib import Path

import pytest

import wmtp
from wmtp.cli import main

QUESTIONS = [
    ("How many legs has a spider?", ["Eight", "Two", "None at all"], 0),
    ("What do bees make?", ["Wine", "Honey", "Paper"], 1),
    ("What comes after Monday?", ["Tuesday", "Sunday", "June"], 0),
    ("Is seven even?", ["Yes", "No"], 1),
    ("What colour is grass?", ["Green", "Red"], 0),
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of choices, one of texts, one of perplexity, and a group of two; and a model beside it."""
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    wmtp.init("chat", "chat")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'q.jsonl'}\ntest_split: test\n"
        'doc_to_text: "{{question}}\\nAnswer:"\n'
    )
    choices = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    metrics = "metric_list:\n  - {metric: acc}\n  - {metric: acc_norm}\n"
    for name in ("own_choices", "own_other"):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{choices}{metrics}")
    (folder / "own_text.yaml").write_text(
        f"task: own_text\n{common}"
        'output_type: generate_until\ndoc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs:\n  until: ["\\n", "e"]\n  max_gen_toks: 12\n  do_sample: false\n'
        "metric_list:\n  - {metric: exact_match}\n"
    )
    (folder / "own_ppl.yaml").write_text(
        f"task: own_ppl\n{common}".replace('doc_to_text: "{{question}}\\nAnswer:"', 'doc_to_text: ""')
        + 'output_type: loglikelihood_rolling\ndoc_to_target: "{{question}}"\nmetric_list:\n  - {metric: word_perplexity}\n'
    )
    (folder / "own_group.yaml").write_text(
        "group: own_group\ntask: [own_choices, own_other]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    )
    return folder


def measured(tasks, names, capsys, **more):
    settings = {"type": "lm-eval", "tasks": names, "uri": str(tasks)} | more
    text = "[[eval]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    Path("eval.toml").write_text(text)
    code = main(["eval", "chat/model", "eval.toml", "--output", "out"])
    return code, capsys.readouterr()


@pytest.mark.slow  # the harness takes half a minute to start
def test_own_tasks_are_measured_and_the_state_of_the_process_is_kept(tasks, capsys):
    import random

    import torch

    random.seed(5)
    torch.manual_seed(5)
    expected = (random.Random(5).random(), torch.rand(1, generator=torch.Generator().manual_seed(5)))
    code, out = measured(tasks, ["own_group", "own_text", "own_ppl"], capsys)
    assert code == 0, out.err
    assert (random.random(), torch.rand(1)) == expected
    numbers = json.loads(Path("out/evaluation.json").read_text())
    assert set(numbers) == {"lm-eval/own_group_acc", "lm-eval/own_text_exact_match", "lm-eval/own_ppl_word_perplexity"}
    details = json.loads(Path("out/evaluation-details.json").read_text())["lm-eval"]["results"]
    assert {"own_choices/acc", "own_choices/acc_norm", "own_other/acc"} < set(details)
    assert details["own_choices/acc"]["n"] == len(QUESTIONS)
    assert details["own_choices/acc"]["low"] <= details["own_choices/acc"]["value"] <= details["own_choices/acc"]["high"]
    assert numbers["lm-eval/own_group_acc"] == details["own_choices/acc"]["value"]
    assert "INFO" not in out.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (["own_choice"], {}, "lm-eval: there is no task 'own_choice'; did you mean 'own_choices'?"),
        (["own_text"], {"max_length": 8}, "lm-eval: a task asks for 12 new tokens, max_length is 8"),
        (["own_text"], {"max_length": 4096}, "4096"),
    ],
)
def test_mistakes_are_said(tasks, names, more, said, capsys):
    code, out = measured(tasks, names, capsys, **more)
    assert code in (1, 2)
    assert said in out.err
    assert "Traceback" not in out.err


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ('eval=[{type="lm-eval", tasks=["x"]}]', "eval.0.type: 'lm-eval' needs lm_eval: pip install 'wmtp-core[lm-eval]'"),
        ("tracker.type=wandb", "tracker.type: 'wandb' needs wandb: pip install 'wmtp-core[wandb]'"),
        ("tracker.type=tensorboard", "tracker.type: 'tensorboard' needs tensorboard: pip install 'wmtp-core[tensorboard]'"),
        ("optimizer.type=adamw-8bit", "optimizer.type: 'adamw-8bit' needs bitsandbytes: pip install 'wmtp-core[bnb]'"),
    ],
)
def test_a_missing_package_is_said_when_the_config_is_checked(setting, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(wmtp.init("completion", tmp_path / "x").folder)
    monkeypatch.setattr("wmtp.config.component_rules.find_spec", lambda name: None)
    with pytest.raises(wmtp.ConfigError) as caught:
        wmtp.check("recipe.toml", overrides=[setting])
    assert any(problem in line for line in caught.value.problems)


@pytest.mark.slow
def test_the_scores_are_those_of_the_harness_own_model(tasks, capsys):
    """With examples before the questions, and contexts that lose their beginning."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["own_choices", "own_text", "own_ppl"]
    code, out = measured(tasks, names, capsys, num_fewshot=2, max_length=100, batch_size=3)
    assert code == 0, out.err
    theirs = HFLM(pretrained="chat/model", dtype=torch.bfloat16, device="cpu", batch_size=2, max_length=100)
    found = simple_evaluate(model=theirs, tasks=names, num_fewshot=2, task_manager=TaskManager(include_path=str(tasks)))
    numbers = json.loads(Path("out/evaluation.json").read_text())
    for task in names:
        for key, value in found["results"][task].items():
            metric, _, kind = key.partition(",")
            if kind == "none" and "stderr" not in metric:
                assert numbers[f"lm-eval/{task}_{metric}"] == pytest.approx(value, rel=2e-2)

"""``wmtp init``: every recipe that the wheel carries is written whole, passes the check, and trains as it is."""

import json
import logging
from pathlib import Path

import pytest

import wmtp
from wmtp.cli import main

ROOT = Path(__file__).parents[3]
RECIPES = list(wmtp.recipes())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_quickstart_is_that_of_the_examples():
    done = wmtp.init("quickstart")
    assert done.files == (Path("quickstart/recipe.toml"),)
    assert done.files[0].read_text() == (ROOT / "examples/quickstart.toml").read_text()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_the_check_in_its_folder(recipe, folder, monkeypatch, capsys):
    assert main(["init", recipe, "a folder/x"]) == 0
    command = "wmtp study study.toml" if recipe == "study" else "wmtp run recipe.toml"
    assert capsys.readouterr().out.splitlines()[-1] == f"next: cd 'a folder/x' && {command}"
    monkeypatch.chdir(folder / "a folder/x")
    assert main(["check", "recipe.toml"]) == 0
    for file in Path().glob("*.toml"):
        assert [line for line in file.read_text().splitlines() if len(line) > 140] == []


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("quickstart", "study")])
def test_every_recipe_trains_and_is_measured(recipe, monkeypatch, capsys):
    """The quickstart itself: tests/test_examples.py."""
    done = wmtp.init(recipe)
    monkeypatch.chdir(done.folder)
    cheap = ("--set", "train.epochs=1", "--set", "tracker.type=jsonl")
    assert main(["run", "recipe.toml", "--run-name", "first", *cheap, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] > 0
    assert answer["metrics"]["eval/loss/head_2"] > 0
    assert main(["eval", "runs/first", "--json"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_the_native_recipe_trains_the_layer_of_its_model(monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.chdir(wmtp.init("native").folder)
    result = wmtp.run("recipe.toml", overrides=["train.max_steps=2", "tracker.type=jsonl", "eval=[]"])
    own, trained = (
        {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (Path("model"), result.model)
    )
    layer = [name for name in own if name.startswith("model.mtp_layers.0.")]
    assert len(layer) > 10
    assert own.keys() == trained.keys()
    assert all(not own[name].equal(trained[name].to(own[name].dtype)) for name in layer if name.endswith("proj.weight"))


def test_a_model_type_that_transformers_does_not_know_is_opened_without_a_remark():
    """As the native recipe's is."""
    from wmtp.tokenizers.hf import open_auto_tokenizer

    remarks: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: remarks.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        open_auto_tokenizer(wmtp.init("native").folder / "model")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert remarks == []


@pytest.mark.slow
def test_the_study_recipe_compares_its_arms(monkeypatch):
    done = wmtp.init("study")
    assert done.files[0].name == "study.toml"
    monkeypatch.chdir(done.folder)
    found = wmtp.study("study.toml", overrides=["train.max_steps=3", "tracker.type=jsonl"], seeds=[0, 1])
    assert not found.failed
    assert {row["arm"] for row in found.rows} == {"baseline", "focal", "shuffled"}
    assert Path("studies/first/report.html").is_file()


def test_nothing_is_overwritten(folder, capsys):
    (folder / "completion").mkdir()
    (folder / "completion/train.jsonl").write_text("mine\n")
    assert main(["init", "completion"]) == 2
    assert capsys.readouterr().err == (
        "error: init: completion/train.jsonl: exists already, and is left as it is; name another folder\n"
    )
    assert [path.name for path in (folder / "completion").iterdir()] == ["train.jsonl"]
    assert (folder / "completion/train.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quickstrt"], "there is no recipe 'quickstrt'; did you mean 'quickstart'?"),
        (["zzz"], f"there is no recipe 'zzz'; one of: {', '.join(RECIPES)}"),
        (["quickstart", "a-file"], "a-file is a file; name a folder"),
        (["quickstart", "a-file/below"], "a-file/below cannot be written: Not a directory; name another folder"),
    ],
)
def test_mistakes(words, said, folder, capsys):
    (folder / "a-file").touch()
    assert main(["init", *words]) == 2
    assert capsys.readouterr().err == f"error: init: {said}\n"


def test_without_a_name_the_recipes_are_listed(capsys):
    assert main(["init"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == RECIPES
    assert main(["init", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["recipes"]) == RECIPES

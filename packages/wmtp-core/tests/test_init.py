"""``wmtp init``: every recipe that the wheel carries is written whole, passes the check, and trains as it is."""

import json
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
    assert capsys.readouterr().out.splitlines()[-1] == "next: cd 'a folder/x' && wmtp run recipe.toml"
    monkeypatch.chdir(folder / "a folder/x")
    assert main(["check", "recipe.toml"]) == 0
    assert [line for line in Path("recipe.toml").read_text().splitlines() if len(line) > 140] == []


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "quickstart"])
def test_every_recipe_trains_and_is_measured(recipe, monkeypatch, capsys):
    """The quickstart itself: tests/test_examples.py."""
    done = wmtp.init(recipe)
    monkeypatch.chdir(done.folder)
    cheap = ("--set", "train.epochs=1", "--set", "tracker.type=jsonl")
    assert main(["run", "recipe.toml", "--run-name", "first", *cheap, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] > 0
    assert answer["metrics"]["eval/loss/head_4"] > 0
    assert main(["eval", "runs/first", "--json"]) == 0
    assert "perplexity" in capsys.readouterr().out


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

"""Paths that a command reads or writes on this machine: what is none of its paths makes no folder of that name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_recipe import SHORTEST_TOML

from wmtp.cli import main

COMMANDS = {
    "init": ["init", "quickstart", "{}"],
    "export": ["export", "model", "{}", "--format", "hf"],
    "report": ["report", "runs/a", "--output", "{}"],
    "eval": ["eval", "runs/a", "--output", "{}"],
    "fetch": ["fetch", "model", "{}"],
    "verify": ["fetch", "--verify", "{}"],
    "push": ["push", "{}", "file:///nowhere/x"],
    "cache": ["cache", "list", "--cache-dir", "{}"],
    "pull": ["runs", "pull", "model", "--into", "{}"],
    "check": ["check", "{}"],
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/config.toml").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/x.html", "'s3://bucket/x.html' is not on this machine; write a path"),
        ("~no-such-user/x.html", "'~no-such-user/x.html': there is no such user on this machine"),
        ("a\0b.html", "holds a NUL character"),
    ],
)
def test_a_place_elsewhere_is_refused(command: str, path: str, message: str, place: Path, capsys) -> None:
    before = sorted(place.rglob("*"))
    assert main([part.format(path) for part in COMMANDS[command]]) == 2
    assert message in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", ["eval", "cache"])
def test_a_file_where_a_folder_belongs_is_named(command: str, capsys) -> None:
    assert main([part.format("runs/a/config.toml") for part in COMMANDS[command]]) == 2
    assert "config.toml: is a file; name " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs", "runs: holds no model; it holds the runs a: name one of them"),
        ("runs/a/checkpoints/step-3", "is a checkpoint of the run"),
    ],
)
def test_parts_of_runs_are_no_models(name: str, message: str, capsys) -> None:
    Path(name).mkdir(parents=True, exist_ok=True)
    assert main(["generate", name, "--prompt", "a", "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_run_in_a_folder_whose_name_is_no_text_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder = place / "caf\udce9"
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 alone")
    monkeypatch.chdir(folder)
    (folder / "recipe.toml").write_text(SHORTEST_TOML, encoding="utf-8")
    assert main(["check", "recipe.toml"]) == 2
    assert "run.output_dir: " in (said := capsys.readouterr().err)
    assert "is not UTF-8 text, which a config is; rename the folder" in said


#: commands that read what is named: what is not there is the user's mistake, wherever it would have been read
READERS = {
    "check": ["check", "{}"],
    "run": ["run", "--resume", "{}"],
    "generate": ["generate", "{}", "--prompt", "a"],
    "export": ["export", "{}", "new", "--format", "hf"],
    "eval": ["eval", "{}"],
    "report": ["report", "{}"],
    "study": ["study", "{}"],
    "fetch": ["fetch", "{}", "new"],
    "verify": ["fetch", "--verify", "{}"],
    "push": ["push", "{}", "./new"],
    "push to a store": ["push", "{}", "s3://bucket/new"],
    "push to the hub": ["push", "{}", "hf://org/new"],
    "pull": ["runs", "pull", "./{}"],
    "distill-data": ["distill-data", "model", "{}", "--output", "new.jsonl"],
}


@pytest.mark.parametrize("command", READERS)
def test_what_is_not_there_is_a_mistake_of_one_line(command: str, place: Path, capsys) -> None:
    before = sorted(place.rglob("*"))
    assert main([part.format("missing") for part in READERS[command]]) == 2
    said = capsys.readouterr().err
    assert len([line for line in said.splitlines() if line.startswith("error: ") and "missing" in line]) == 1, said
    assert [path for path in sorted(place.rglob("*")) if path not in before and path.name != "new"] == []


@pytest.mark.parametrize("command", ["generate", "export", "eval", "fetch", "push", "push to the hub", "distill-data"])
def test_a_pipe_and_a_device_are_called_so(command: str, place: Path, capsys) -> None:
    os.mkfifo(place / "pipe")
    for name, kind in (("pipe", "named pipe"), ("/dev/null", "device")):
        assert main([part.format(name) for part in READERS[command]]) == 2
        assert f"{name}: is a {kind}, which is read once at most; write what it gives into a file" in capsys.readouterr().err


@pytest.mark.parametrize("loader", ["jsonl", "text", "chat", "python-source"])
def test_a_pipe_as_data_or_model_of_a_recipe_is_called_so(loader: str, place: Path, capsys) -> None:
    os.mkfifo(place / "pipe")
    (place / "recipe.toml").write_text(SHORTEST_TOML, encoding="utf-8")
    data, model = f'datasets.code={{type="{loader}", uri="pipe"}}', 'models.base={type="hf", uri="pipe"}'
    for key, override in (("datasets.code.uri", data), ("models.base.uri", model)):
        assert main(["check", "recipe.toml", "--set", override]) == 2
        said = capsys.readouterr().err
        assert said.count(f"{key}: {place / 'pipe'}: is a named pipe") == 1, said


def test_nothing_is_fetched_onto_a_file(place: Path, capsys) -> None:
    (place / "data.jsonl").write_text("{}")
    assert main(["fetch", "data.jsonl", "runs/a/config.toml"]) == 2
    assert "runs/a/config.toml is a file; name a folder to fetch into" in capsys.readouterr().err

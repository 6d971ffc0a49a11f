"""Paths that a command reads or writes on this machine: what is none of its paths makes no folder of that name."""

from __future__ import annotations

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

"""Seeded damage of every JSON, JSONL and TOML file of a run and its model: commands name the file, and exit with 2."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from crossings import sampled
from damage import of_bytes, of_values, said_by

from wmtp.cli import main
from wmtp.data.store import TokenStore
from wmtp.errors import FileError, WMTPError
from wmtp.json_files import reading
from wmtp.storage.atomic import replace_text
from wmtp.training.telemetry import StepFile

_SHORT = ("train.max_steps=6", "train.eval_interval=3", "checkpoints.save_interval=3", "models.base.heads.warmup_steps=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder)
    recipe.write_text(recipe.read_text() + '\n[[eval]]\ntype = "perplexity"\n')
    words = [word for setting in _SHORT for word in ("--set", setting)]
    assert main(["run", str(recipe), "--run-name", "one", *words]) == 0
    return folder


def _commands(run: Path) -> list[list[str]]:
    return [
        ["report", str(run), "--output", str(run.parent / "page.html")],
        ["check", str(run / "config.toml")],
        ["generate", str(run / "model"), "--prompt", "x", "--max-new-tokens", "2"],
    ]


def _interrupted(run: Path) -> list[list[str]]:
    return [["run", "--resume", str(run)]]


def _attack(folder: Path, seed: int, commands: Callable[[Path], list[list[str]]], share: float) -> list[str]:
    """Run the commands over damaged copies; return what they said wrongly."""
    rng, run, wrong = random.Random(seed), folder / "runs/one", []
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".jsonl", ".toml") and path.stat().st_size]
    for file in files:
        text = file.read_bytes()
        cases = [*of_bytes(rng, text), *(case for _ in range(4) if file.suffix != ".toml" for case in of_values(rng, text))]
        for name, content in cases:
            for words in commands(run):
                if rng.random() > share:
                    continue
                file.write_bytes(content)
                code, said = said_by(words)
                is_named = code == 0 or file.name in said or file.parent.name in said
                if code not in (0, 2) or "--debug" in said or "Traceback" in said or not is_named:
                    wrong.append(f"{words[0]}: {file.relative_to(folder)}, {name}: {code}: {said[-300:]}")
                if words[0] == "run":
                    shutil.rmtree(folder)
                    shutil.copytree(kept, folder)
        file.write_bytes(text)
    return wrong


def _copy(trained: Path, folder: Path) -> Path:
    work = folder / "work"
    shutil.copytree(trained, work)
    config = work / "runs/one/config.toml"
    config.write_text(config.read_text().replace(str(trained), str(work)))
    return work


@pytest.mark.parametrize("seed", sampled(range(6), 6))
def test_damaged_files_are_named(trained: Path, tmp_path: Path, seed: int) -> None:
    wrong = _attack(_copy(trained, tmp_path), seed, _commands, 0.12 if seed == 0 else 1)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_damaged_files_are_named_at_a_resume(trained: Path, tmp_path: Path) -> None:
    work = _copy(trained, tmp_path)
    run = work / "runs/one"
    for folder in (run / "model", run / "checkpoints/step-6"):
        shutil.rmtree(folder)
    info = run / "run.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"status": "interrupted"}))
    wrong = _attack(work, 0, _interrupted, 1)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("value", [1.5, "x", {}, [[1]]])
def test_an_end_token_that_is_none_is_named(trained: Path, tmp_path: Path, value: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "runs/one/model", model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    code, said = said_by(["generate", str(model), "--prompt", "x", "--max-new-tokens", "2"])
    assert code == 2
    assert "generation_config.json: is damaged: eos_token_id is" in said


@pytest.mark.parametrize(
    "change", [{"token_type": {"a": 1}}, {"has_weights": {"a": 1}}, {"has_weights": True}, {"tokens": "x"}]
)
def test_a_token_store_with_a_wrong_value_is_none(trained: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """It is made anew: the cache is no file of the user's."""
    (source,) = (trained / "runs/.cache/tokens").glob("*/store.json")
    shutil.copytree(source.parent, tmp_path / "store")
    assert TokenStore.open_if_whole(tmp_path / "store", "x") is not None
    info = tmp_path / "store/store.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | change))
    assert TokenStore.open_if_whole(tmp_path / "store", "x") is None


def test_a_damaged_config_of_a_run_ends_its_resume_with_2(trained: Path, tmp_path: Path) -> None:
    run = _copy(trained, tmp_path) / "runs/one"
    (run / "config.toml").write_text("[run")
    code, said = said_by(["run", "--resume", str(run)])
    assert code == 2
    assert "config.toml: is damaged: " in said


@pytest.mark.parametrize(
    "damage", [ValueError("x"), KeyError("x"), TypeError("x"), RecursionError(), MemoryError(), OSError(5, "x")]
)
def test_reading_names_the_file(damage: Exception) -> None:
    with (
        pytest.raises(FileError, match=r"^folder/file\.json: (is damaged|cannot be read): ") as caught,
        reading("folder/file.json"),
    ):
        raise damage
    assert caught.value.exit_code == 2


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = StepFile(tmp_path / "metrics.jsonl", 0)
    steps.close()
    steps._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    for act in (lambda: steps.write(1, {"loss": 1.0}), steps.close):
        with pytest.raises(WMTPError, match=r"metrics\.jsonl.* cannot be written: .*No space left"):
            act()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(WMTPError, match=r"run\.json: cannot be written: No space left"):
        replace_text(tmp_path / "run.json", "{}\n")

"""Seeded damage of what measures, exports, copies and compares: every command names the file, and exits with 2."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_recipe
from damage import of_bytes, of_tensors, of_values, said_by

pytestmark = pytest.mark.slow

STUDY = """
[study]
name = "small"
recipe = "recipe.toml"
seeds = [3, 4]
baseline = "baseline"
metrics = ["eval/loss/head_1"]
[set]
train = { max_steps = 2, eval_interval = 1 }
checkpoints.save_final = false
models.base.heads.warmup_steps = 0
schedule.warmup_steps = 0
[arms.baseline]
[arms.other.set]
optimizer.lr = 1e-4
"""
_SUFFIXES = (".json", ".jsonl", ".toml", ".csv", ".safetensors")
_TRAIN = ("train.max_steps=2", "train.eval_interval=1", "models.base.heads.warmup_steps=0", "schedule.warmup_steps=0")


def _cases(rng: random.Random, file: Path) -> Iterator[tuple[str, bytes | None]]:
    content = file.read_bytes() or b"{}"
    yield from of_bytes(rng, content)
    if file.suffix == ".safetensors":
        yield from of_tensors(rng, content)
    elif file.suffix in (".json", ".jsonl"):
        for _ in range(4):
            yield from of_values(rng, content)
    yield "a folder", None


def _plans(work: Path) -> list[tuple[list[str], list[Path]]]:
    """List commands, and the files that each may meet damaged."""
    run, study = work / "runs/one", work / "studies"
    of_run = [file for file in run.rglob("*") if file.suffix in _SUFFIXES]
    of_study = [file for file in study.rglob("*") if file.suffix in _SUFFIXES and "tokens" not in file.parts]
    fetched, lines = list((work / "fetched").iterdir()), [work / "p.jsonl", *work.glob(".d.jsonl*"), *work.glob("d.jsonl*")]
    model = run / "model"
    return [
        (["eval", str(run)], of_run),
        (["export", str(run), str(work / "out"), "--format", "hf"], of_run),
        (["export", str(model), str(work / "out"), "--format", "wmtp"], list(model.iterdir())),
        (["push", str(model), str(work / "out")], list(model.iterdir())),
        (["study", "study.toml"], [work / "study.toml", *of_study]),
        (["study", "study.toml", "--dry-run"], [work / "study.toml", work / "recipe.toml"]),
        (["distill-data", str(model), "p.jsonl", "--output", "d.jsonl", "--max-new-tokens", "3"], lines),
        (["fetch", str(work / "fetched"), str(work / "again")], fetched),
        (["fetch", str(model), str(work / "fetched")], [file for file in fetched if not file.name.startswith(".")]),
        (["clean", str(work)], fetched),
        (["init", "quickstart", "p.jsonl"], [work / "p.jsonl"]),
    ]


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a study, answers of a model and a fetched copy."""
    work, before = tmp_path_factory.mktemp("worked") / "work", Path.cwd()
    work.mkdir()
    recipe = write_recipe(work)
    recipe.write_text(recipe.read_text() + '\n[[eval]]\ntype = "perplexity"\n')
    (work / "study.toml").write_text(STUDY)
    (work / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    os.chdir(work)
    try:
        for words in (
            ["run", "recipe.toml", "--run-name", "one", *(word for setting in _TRAIN for word in ("--set", setting))],
            ["study", "study.toml"],
            ["distill-data", "runs/one/model", "p.jsonl", "--output", "d.jsonl", "--max-new-tokens", "3"],
            ["fetch", str(work / "runs/one/model"), "fetched"],
        ):
            code, said = said_by(words)
            assert code == 0, said
    finally:
        os.chdir(before)
    return work


@pytest.mark.parametrize("seed", range(3))
def test_every_command_names_a_damaged_file(worked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng, kept, wrong = random.Random(seed), tmp_path / "kept", []
    shutil.copytree(worked, kept)
    tried = 0
    for words, files in _plans(worked):
        monkeypatch.chdir(worked)
        for file in rng.sample(files, min(len(files), 12)):
            for name, content in rng.sample(list(_cases(rng, file)), 3):
                file.unlink()
                if content is None:
                    file.mkdir()
                else:
                    file.write_bytes(content)
                code, said = said_by(words)
                is_named = code == 0 or file.name in said or file.parent.name in said
                is_in_the_way = content is None and code == 1 and f"{file}: " in said  # of what the command writes
                if (code not in (0, 2) and not is_in_the_way) or "--debug" in said or "Traceback" in said or not is_named:
                    wrong.append(f"{words[0]}: {file.relative_to(worked)}, {name}: {code}: {said[-300:]}")
                shutil.rmtree(worked)
                shutil.copytree(kept, worked)
                os.chdir(worked)
                tried += 1
    print(f"{tried} cases")
    assert not wrong, "\n".join(wrong)
    assert tried > 100

"""A disk that is full at every moment of a command's work: it fails in one line that names a file there, or it is done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_recipe
from damage import said_by

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")]

_SHORT = ("train.max_steps=2", "train.eval_interval=1", "models.base.heads.warmup_steps=0", "schedule.warmup_steps=0")
_SETS = [word for setting in _SHORT for word in ("--set", setting)]
#: 4 KiB each that are left to begin with; from one to the next by at most a quarter
_PAGES = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    8,
    10,
    12,
    15,
    18,
    22,
    26,
    32,
    38,
    46,
    56,
    66,
    80,
    98,
    120,
    150,
    185,
    230,
    280,
    350,
    440,
    550,
    690,
    860,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder)
    (folder / "p.jsonl").write_text('{"prompt": "x"}\n' * 40)
    assert said_by(["run", str(recipe), "--run-name", "one", *_SETS])[0] == 0
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


COMMANDS = {
    "report": "report {one} --output {disk}/page.html",
    "export hf": "export {one} {disk}/out --format hf",
    "export wmtp": "export {one} {disk}/out --format wmtp",
    "distill": "distill-data {one}/model {trained}/p.jsonl --output {disk}/d.jsonl --max-new-tokens 200",
    "fetch": "fetch {one}/model {disk}/m",
    "push": "push {one}/model {disk}/m",
    "init": "init quickstart {disk}/q",
    # another folder each time: MLflow keeps the database of one open, and so its room taken
    "jsonl": "run {trained}/recipe.toml --set run.output_dir={disk}/{number}",
    "mlflow": "run {trained}/recipe.toml --set run.output_dir={disk}/{number} --set tracker.type=mlflow",
    "tensorboard": "run {trained}/recipe.toml --set run.output_dir={disk}/{number} --set tracker.type=tensorboard",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_that_names_a_file(trained: Path, disk: Path, name: str) -> None:
    wrong, codes = [], []
    for number, pages in enumerate(_PAGES):
        words = COMMANDS[name].format(one=trained / "runs/one", trained=trained, disk=disk, number=number).split()
        for each in disk.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        with (disk / "fill").open("wb") as file:
            file.write(bytes(max(0, os.statvfs(disk).f_bavail - pages) * 4096))
        code, said = said_by([*words, *(_SETS if words[0] == "run" else [])])
        codes.append(code)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        is_named = len(lines) == 1 and str(disk) in lines[0] and re.search("No space left|disk is full", lines[0]) is not None
        if "--debug" in said or "Traceback" in said or (code and not is_named):
            wrong.append(f"{pages} pages: {code}: {said[-400:]}")
        if code == 0:
            break
    assert not wrong, "\n".join(wrong)
    assert codes[-1] == 0, "it never had room enough"
    assert set(codes[:-1]) <= {1, 2}

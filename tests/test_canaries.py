"""Secrets of the environment and signed addresses: no command of a whole day's work shows or saves one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import write_recipe

from wmtp.cli import main

#: variables that hold secrets of services, and of whoever runs this
SECRETS = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "GITHUB_TOKEN"),
    *("MLFLOW_TRACKING_TOKEN", "VESSL_ACCESS_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_API_KEY", "DATABASE_URL"),
)
#: where an address may stand
PLACES = [
    *(
        "recipe",
        "set",
        "study",
        "reference",
        "tag",
        "name",
        "tracker",
        "launcher",
        "report",
        "export",
        "distill",
        "output",
        "eval",
    )
]
_SHORT = ("train.max_steps=2", "train.eval_interval=1", "models.base.heads.warmup_steps=0", "schedule.warmup_steps=0")
STUDY = """
[study]
name = "small"
recipe = "recipe.toml"
seeds = [3]
baseline = "baseline"
metrics = ["eval/loss/head_1"]
[arms.baseline]
[arms.other.set]
datasets.code.uri = "{uri}"
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(SECRETS):
        monkeypatch.setenv(name, f"canary{number}environment")
    monkeypatch.setenv("SIGNED", "http://127.0.0.1:1/code.jsonl?X-Amz-Signature=canarysigned")
    monkeypatch.setenv("OWNED", "http://me:canaryowned@127.0.0.1:1/code.jsonl")
    return tmp_path


def _leaks(folder: Path, said: str) -> list[str]:
    found = [line for line in said.splitlines() if "canary" in line]
    sources = ("recipe.toml", "study.toml", "launch.toml")
    written = (path for path in folder.rglob("*") if path.is_file() and path.name not in sources)
    return found + [str(path) for path in written if b"canary" in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["mlflow", "tensorboard"])
def test_secrets_of_the_environment_stay_there(work: Path, capfd: pytest.CaptureFixture[str], tracker: str) -> None:
    words = [word for setting in (*_SHORT, f"tracker.type={tracker}") for word in ("--set", setting)]
    (work / "p.jsonl").write_text('{"prompt": "x"}\n')
    (work / "study.toml").write_text(STUDY.format(uri=work / "code.jsonl"))
    run, debug = "runs/one", ["--debug", "--verbose"]
    for command in (
        ["run", "recipe.toml", "--run-name", "one", *words],
        ["run", "recipe.toml", "--run-name", "broken", *words, "--set", "optimizer.lr=1e30", "--set", "train.max_grad_norm=0"],
        ["report", run],
        ["export", run, "out", "--format", "wmtp"],
        ["distill-data", f"{run}/model", "p.jsonl", "--output", "d.jsonl", "--max-new-tokens", "4"],
        ["study", "study.toml", *words],
        ["eval", run],
        ["generate", f"{run}/model", "--prompt", "x", "--max-new-tokens", "2"],
    ):
        main([*command, *debug])
    out, err = capfd.readouterr()
    assert (work / run / "model").is_dir()
    assert not _leaks(work, out + err)


@pytest.mark.parametrize("name", ["SIGNED", "OWNED"])
@pytest.mark.parametrize("place", PLACES)
def test_an_address_with_a_secret_is_shown_nowhere(
    work: Path, capfd: pytest.CaptureFixture[str], name: str, place: str
) -> None:
    uri, recipe = os.environ[name], work / "recipe.toml"
    text = recipe.read_text()
    (work / "p.jsonl").write_text('{"prompt": "x"}\n')
    (work / "study.toml").write_text(STUDY.format(uri=uri))
    (work / "launch.toml").write_text(f'[launcher]\ntype = "vessl"\nenvironment = {{ X = "{uri}" }}\n')
    if place == "recipe":
        recipe.write_text(text.replace("code.jsonl", f"code.jsonl#{uri}").replace("[run]", f'[run]\ntags = ["{uri}"]', 1))
    commands = {
        "recipe": [["check", "recipe.toml"], ["run", "recipe.toml"]],
        "set": [["check", "recipe.toml", "--set", f"datasets.code.uri={uri}"]],
        "study": [["study", "study.toml", "--dry-run"], ["study", "study.toml"]],
        "reference": [
            [*words, "--set", f"datasets.code.uri=${{env:{name}}}"] for words in (["check", recipe], ["run", recipe])
        ],
        "tag": [["run", "recipe.toml", "--dry-run", "--tags", uri]],
        "name": [["run", "recipe.toml", "--dry-run", "--run-name", uri]],
        "tracker": [["run", "recipe.toml", "--set", "tracker.type=mlflow", "--set", f"tracker.tracking_uri={uri}"]],
        "launcher": [["launch", "recipe.toml", "launch.toml", "--dry-run"]],
        "report": [["report", uri]],
        "export": [["export", uri, "out", "--format", "hf"]],
        "distill": [["distill-data", uri, "p.jsonl", "--output", "d.jsonl"], ["distill-data", "m", uri, "--output", "d.jsonl"]],
        "output": [["distill-data", "m", "p.jsonl", "--output", uri], ["report", "runs/x", "--output", uri]],
        "eval": [["eval", uri]],
    }[place]
    storage = ["--set", "storage.http.retry_timeout=0"]
    for command in commands:
        more = [] if command[0] in ("study", "generate") else storage
        assert main([*map(str, command), *more, "--debug", "--verbose"]) != 0, command
        out, err = capfd.readouterr()
        assert not _leaks(work, out + err), command

"""One recipe, every input and output of which is in an object store, and the commands that use what it made."""

import json
import os
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from conftest import HELD, environment

import wmtp as library
from wmtp.checkpoints.remote import RemoteCheckpoints
from wmtp.cli import main
from wmtp_storage import S3Storage
from wmtp_storage.testing import s3_server

__all__ = ["s3_server"]

RECIPE = """
[models.base]
type = "hf"
uri = "s3://{bucket}/models/base model"
[models.base.heads]
horizon = 2
[models.ref]
type = "hf"
uri = "s3://{bucket}/models/ref"
[tokenizer]
type = "bytes"
[datasets.code]
type = "jsonl"
uri = "s3://{bucket}/data/code.jsonl"
[datasets.held-out]
type = "jsonl"
uri = "s3://{bucket}/data/eval"
[data.train]
sources = ["code"]
max_length = 64
batch_size = 4
[data.eval]
sources = ["held-out"]
[trainer]
type = "rho1-wmtp"
[train]
max_steps = 40
[checkpoints]
uri = "s3://{bucket}/runs/one"
save_interval = 5
keep_last = 1
[tracker]
type = "mlflow"
tracking_uri = "s3://{bucket}/mlruns"
[[eval]]
type = "perplexity"
"""


@pytest.fixture
def here(s3_server, tmp_path, monkeypatch):
    """Environment in which a process finds the store; its home is empty."""
    for name, value in (s3_server.environment | {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return s3_server.bucket()


def wmtp(capsys, *words):
    """The exit code of a command, what it printed, and what it said; it runs in this process."""
    capsys.readouterr()
    code = main([*map(str, words)])
    printed, said = capsys.readouterr()
    assert "Traceback" not in said
    return code, printed, said


def model(folder):
    """A model folder of the kind that runs leave."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=128, **sizes)).save_pretrained(folder)
    (folder / "wmtp_tokenizer.json").write_text('{"type": "bytes"}')
    return folder


def test_a_run_in_a_store_is_a_model(here, tmp_path, capsys):
    """As its checkpoints.uri names it, and so that what its steps left there is not fetched."""
    run = f"s3://{here}/runs/one"
    S3Storage().build().push(model(tmp_path / "made"), f"{run}/model")
    for name in ("run/config.toml", "step-5/state.pt"):
        (tmp_path / "other").write_text("large")
        S3Storage().build().push(tmp_path / "other", f"{run}/{name}")
    found = library.load_model(run)
    assert found.generate("def f", max_new_tokens=2).tokens == library.load_model(f"{run}/model").generate(
        "def f", max_new_tokens=2).tokens  # fmt: skip
    assert library.load_tokenizer(run).encode("ab") == [*b"ab"]
    assert wmtp(capsys, "generate", run, "--prompt", "def f", "--max-new-tokens", 2)[0] == 0
    assert wmtp(capsys, "export", run, tmp_path / "exported", "--format", "hf")[0] == 0
    assert not list((tmp_path / "home").rglob("state.pt"))


@pytest.mark.slow
def test_a_recipe_with_everything_in_a_store(recipe, preloaded, here, tmp_path, capsys):
    """Begun on machine A, which is killed; finished on machine B, which has the recipe and credentials, nothing else."""
    for name in ("base%20model", "ref"):
        assert wmtp(capsys, "push", model(tmp_path / "made"), f"s3://{here}/models/{name}")[0] == 0
    for name in ("code.jsonl", "eval/a.jsonl"):
        assert wmtp(capsys, "push", tmp_path / "code.jsonl", f"s3://{here}/data/{name}")[0] == 0
    (tmp_path / "code.jsonl").unlink()
    recipe.write_text(RECIPE.format(bucket=here))
    assert wmtp(capsys, "check", recipe)[::2] == (0, "")

    storage, one = S3Storage().build(), f"s3://{here}/runs/one"
    words = ("run", recipe, "--run-name", "one")
    (tmp_path / "a").mkdir()
    with (tmp_path / "log").open("w") as log:
        elsewhere = environment() | {"HOME": str(tmp_path / "a")}
        first = preloaded.start(12, *words, code=HELD, stderr=log, stdout=log, cwd=tmp_path / "a", env=elsewhere)
        while not RemoteCheckpoints(storage, one).steps():
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    code, printed, said = wmtp(capsys, *words, "--resume", "auto", "--json")
    assert code == 0, said
    assert "holds checkpoints of this run, begun elsewhere" in said
    answer = json.loads(printed)
    assert answer["steps"] == 40
    assert all(os.fspath(tmp_path / "runs") in answer[key] for key in ("run_dir", "model", "checkpoint"))
    assert len(list((tmp_path / "home/.cache/wmtp").glob("*/complete.json"))) == 4

    # what it left in the store is all that the commands need
    code, printed, said = wmtp(capsys, "generate", f"{one}/model", "--prompt", "def f", "--max-new-tokens", 4, "--json")
    assert code == 0, said
    assert len(json.loads(printed)["tokens"]) == 4
    code, printed, said = wmtp(capsys, "export", f"{one}/model", tmp_path / "exported", "--format", "hf", "--json")
    assert code == 0, said
    assert "model.safetensors" in json.loads(printed)["files"]
    (tmp_path / "eval.toml").write_text(
        f'[datasets.x]\ntype = "jsonl"\nuri = "s3://{here}/data/eval/a.jsonl"\n[data.eval]\nsources = ["x"]\n'
        f'[[eval]]\ntype = "perplexity"\n[storage]\ncache_dir = "{tmp_path}/cache"\n'
        f'[storage.s3]\nendpoint = "{os.environ["AWS_ENDPOINT_URL_S3"]}"\n'
    )
    with pytest.MonkeyPatch.context() as patch:  # the file alone says where the store is
        patch.delenv("AWS_ENDPOINT_URL_S3")
        code, printed, said = wmtp(capsys, "eval", f"{one}/model", tmp_path / "eval.toml", "--json")
    assert code == 0, said
    assert json.loads(printed)["metrics"].keys() == {"perplexity/head_1", "perplexity/head_2"}
    assert len(list((tmp_path / "cache").glob("*/complete.json"))) == 2, "model and data, in the cache that the file names"
    code, printed, said = wmtp(capsys, "report", one)
    assert code == 0, said
    assert '"one"' in (tmp_path / "report.html").read_text()
    # measured again, the run's record in the store has it too
    code, _, said = wmtp(capsys, "eval", tmp_path / "runs/one", "--set", 'eval=[{type="token-accuracy"}]')
    assert code == 0, said
    storage.fetch(f"s3://{here}/mlruns", tmp_path / "tracked")
    (database,) = (tmp_path / "tracked").glob("*/mlflow.db")
    with closing(sqlite3.connect(database)) as connection:
        steps = [step for (step,) in connection.execute("SELECT step FROM metrics WHERE key = 'loss'")]
        names = {name for (name,) in connection.execute("SELECT key FROM metrics")}
    assert sorted(set(steps)) == sorted(steps)
    assert max(steps) == 40
    assert {"perplexity/head_1", "token-accuracy/head_1"} <= names


def test_mistakes_are_told_before_anything_is_fetched(recipe, here, tmp_path, capsys):
    storage = S3Storage().build()
    for name in ("tiny", "large"):
        (tmp_path / "config.json").write_text("{}")
        storage.push(tmp_path / "config.json", f"s3://{here}/models/{name}/config.json")
    recipe.write_text(RECIPE.format(bucket=here))

    def fails(*words, command=("run", recipe, "--dry-run")):
        code, _, said = wmtp(capsys, *command, *(part for word in words for part in ("--set", word)))
        return code, said

    models = f"s3://{here}/models"
    assert fails(f"models.base.uri={models}/tinny") == (
        2, f"error: {models}/tinny: nothing is there; in {models} there is: tiny\n"
    )  # fmt: skip
    assert fails(f"models.base.uri=s3://{here}/modles/tiny/deep")[1] == (
        f"error: s3://{here}/modles/tiny/deep: nothing is there; in s3://{here} there is: models\n"
    )
    assert fails(f"models.base.uri=s3://{here}x/tiny")[1].startswith(
        f"error: s3://{here}x/tiny could not be listed: there is no such bucket; there is: {here}"
    )
    code, said = fails(f"models.base.uri={models}")
    assert code == 2
    assert f"models.base.uri: {models} is no model: the folder has no config.json" in said
    assert said.endswith(f"it has models in it: {models}/large, {models}/tiny\n")
    assert fails(command=("generate", models, "--prompt", "x")) == (2, said.replace("--set models.base.uri: ", ""))
    code, said = fails(f"models.base.uri={models}/tiny")
    assert code == 2
    assert said.endswith(f" (fetched from {models}/tiny)\n"), "a path in the cache alone would not tell which model it is"
    assert "there is no such bucket" in fails(f"checkpoints.uri=s3://{here}x/one")[1]
    code, said = fails(f"checkpoints.uri={models}", command=("run", recipe, "--run-name", "one"))
    assert (code, said) == (
        2, f"error: --set checkpoints.uri: {models} holds something else (large, tiny); name a folder of this run alone\n"
    )  # fmt: skip
    wrong = (
        "models.base.uri=s3:/x",
        f"models.ref.uri=s3://{here}/../x",
        "datasets.code.uri=s3://",
        "checkpoints.uri=s3://b/x?y",
    )
    code, said = fails(*wrong, command=("check", recipe))
    assert code == 2
    assert said.count("error: ") == len(wrong) + 1, "a query may be a secret, and cannot stand in a name"
    assert "models.base.uri: 's3:/x' is no URI; write 's3://x'" in said or "'s3:/x' names no bucket" in said
    assert f"models.ref.uri: 's3://{here}/../x': '.' and '..' mean nothing in an object store" in said
    assert "datasets.code.uri: 's3://' names no bucket" in said
    assert "checkpoints.uri: 's3://b/x': in a name '?' must be written %3F" in said
    assert fails(command=("report", models))[1] == (
        f"error: {models} holds no run; write a checkpoints.uri, below which is the folder 'run'\n"
    )
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_without_the_package_it_is_named(recipe, here, monkeypatch, capsys):
    monkeypatch.setenv("WMTP_PLUGINS", "wmtp-core,wmtp-algos")
    recipe.write_text(RECIPE.format(bucket=here))
    code, _, said = wmtp(capsys, "check", recipe)
    assert code == 2
    assert (
        said.count("no installed plugin serves s3:// URIs; installed: file://, hf://, package://; WMTP_PLUGINS leaves out") == 6
    )

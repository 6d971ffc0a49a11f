"""Runs whose model, tokenizer and data have names of the Hugging Face hub, against a server of this machine."""

import json
import os
import subprocess
import sys

import pytest
import tomli
import torch
from hub_server import TOKEN, FakeHub
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.tokenizers.bytes import BytesTokenizer

#: ``wmtp …`` in a fork; huggingface_hub reads its variables when it is imported
COMMAND = """
import importlib
from huggingface_hub import constants
importlib.reload(constants)
from wmtp.cli import run_from_shell
run_from_shell()
"""
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=128, **SIZES)).save_pretrained(folder)
    BytesTokenizer().save(folder)
    return folder


@pytest.fixture
def hub(folder):
    """A hub with a model ``tiny/llama``."""
    hub = FakeHub()
    hub.put("models/tiny/llama", {file.name: file.read_bytes() for file in folder.iterdir()})
    yield hub
    hub.close()


@pytest.fixture
def run_wmtp(hub, preloaded, tmp_path):
    """Runs ``wmtp …`` with that hub in a folder of its own, in a new interpreter if told so; the keywords are variables."""
    (tmp_path / "cwd").mkdir()

    def run(*arguments, cwd=tmp_path / "cwd", anew=False, **variables):
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env |= hub.environment(tmp_path / "hf") | {"HOME": str(tmp_path)} | variables
        if not anew:
            return preloaded.run(*arguments, code=COMMAND, env=env, cwd=cwd)
        command = [sys.executable, "-m", "wmtp", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=cwd)

    return run


@pytest.fixture
def config(recipe, tmp_path):
    """Writes the recipe with another model, and returns its path."""

    def write(uri, **replaced):
        text = recipe.read_text()
        start, end = text.index("[models.base]"), text.index("[models.base.heads]")
        text = text[:start] + f'[models.base]\ntype = "hf"\nuri = "{uri}"\n' + text[end:]
        text = text.replace('[tokenizer]\ntype = "bytes"\n', "")
        for old, new in {"warmup_steps = 4": "", "max_steps = 40": "max_steps = 6", **replaced}.items():
            text = text.replace(old, new)
        path = tmp_path / "hub.toml"
        path.write_text(text + f'[storage]\ncache_dir = "{tmp_path}/cache"\n')
        return path

    return write


def snapshot(run_dir):
    return tomli.loads((run_dir / "config.toml").read_text())


def test_check_asks_nobody_and_says_how_it_reads_the_name(hub, run_wmtp, config):
    done = run_wmtp("check", config("tiny/llama"))
    assert done.returncode == 0, done.stderr
    assert "hf://tiny/llama" in done.stdout
    assert "models.base.uri: 'tiny/llama' is no path here, so it is the hub's: hf://tiny/llama" in done.stderr
    assert hub.requests == []


def test_a_run_is_pinned_to_the_commit_and_resumes_there_without_the_hub(hub, run_wmtp, config, tmp_path):
    first = hub.refs["models/tiny/llama"]["main"]
    path = config("tiny/llama")
    dry = run_wmtp("run", path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    done = run_wmtp("run", path, "--run-name", "a", "--set", "report.samples=2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/a"
    assert snapshot(run)["models"]["base"]["uri"] == f"hf://tiny/llama@{first}"
    assert json.loads((run / "run.json").read_text())["given"]["models.base.uri"] == "hf://tiny/llama"
    # the hub moves on, and then is away: the run stays what it was
    hub.put("models/tiny/llama", {"config.json": b"{}"})
    hub.fault = lambda handler: handler.answer(503) or True
    hub.requests.clear()
    again = run_wmtp("run", path, "--resume", "auto", "--run-name", "a", "--set", "report.samples=2")
    assert again.returncode == 0, again.stderr
    assert run_wmtp("eval", run, "--set", 'eval=[{type="perplexity"}]').returncode == 0
    assert hub.requests == []
    other = run_wmtp("run", path, "--resume", "auto", "--run-name", "a", "--set", "models.base.uri=tiny/llama@v2")
    assert other.returncode == 2
    assert "models.base.uri" in other.stderr


@pytest.mark.slow
def test_two_processes_train_on_one_commit(hub, run_wmtp, config, tmp_path):
    done = run_wmtp("run", config("hf://tiny/llama"), "--run-name", "two", "--set", "launcher.processes=2")
    assert done.returncode == 0, done.stderr
    assert "@" in snapshot(tmp_path / "runs/two")["models"]["base"]["uri"]


@pytest.mark.slow
def test_a_local_folder_of_that_name_stays_one(hub, run_wmtp, config, tmp_path, folder):
    (tmp_path / "cwd/tiny").mkdir()
    (tmp_path / "cwd/tiny/llama").symlink_to(folder)
    done = run_wmtp("run", config("tiny/llama"), "--run-name", "a")
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    assert snapshot(tmp_path / "runs/a")["models"]["base"]["uri"] == str(tmp_path / "cwd/tiny/llama")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (
            "tiny/lama",
            ["hub.toml:6: models.base.uri: hf://tiny/lama: there is no such model on http://127", "nor is there a folder"],
        ),
        ("hf://tiny/llama@v7", ["hub.toml:6: models.base.uri: hf://tiny/llama@v7: this model has no revision 'v7'"]),
        ("org/gated", ["models.base.uri: hf://org/gated@", "this model is gated: ask for access on http://127.0.0.1"]),
        ("hf://org/weights", ["is no model: the folder has no config.json"]),
    ],
)
def test_what_the_hub_does_not_give_is_said_with_file_and_line(hub, run_wmtp, config, uri, says):
    hub.put("models/org/gated", hub.files("models/tiny/llama"))
    hub.gated.add("models/org/gated")
    hub.put("models/org/weights", {"a/b.bin": b"1"})
    done = run_wmtp("run", config(uri), "--dry-run")
    assert done.returncode == 2, done.stderr
    assert all(line in done.stderr for line in says), done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_whose_model_is_not_there_leaves_its_name_free(run_wmtp, config, tmp_path):
    done = run_wmtp("run", config("tiny/lama"), "--run-name", "a")
    assert done.returncode == 2
    assert "hub.toml:6: models.base.uri: hf://tiny/lama: there is no such model" in done.stderr
    assert not (tmp_path / "runs/a").exists()


def test_a_path_with_a_mistake_gets_both_readings(hub, run_wmtp, config, tmp_path):
    (tmp_path / "cwd/models").mkdir()
    done = run_wmtp("check", config("models/llama"))
    assert done.returncode == 2
    assert f"models.base.uri: 'models/llama' does not exist (that is {tmp_path}/cwd/models/llama)" in done.stderr
    assert "write hf://models/llama" in done.stderr
    done = run_wmtp("check", config("tiny/llama", **{f"{tmp_path}/code.jsonl": "org/data"}))
    assert "datasets.code.uri: 'org/data' does not exist" in done.stderr
    assert "hf://datasets/org/data" in done.stderr


def test_a_data_set_and_a_tokenizer_of_the_hub(hub, run_wmtp, config, tmp_path):
    hub.put("datasets/org/data", {"train/code.jsonl": (tmp_path / "code.jsonl").read_bytes(), "README.md": b"#"})
    hub.put("models/org/tokenizer", {"wmtp_tokenizer.json": hub.files("models/tiny/llama")["wmtp_tokenizer.json"]})
    path = config("tiny/llama", **{f"{tmp_path}/code.jsonl": "hf://datasets/org/data/train"})
    done = run_wmtp("run", path, "--run-name", "a")
    assert done.returncode == 0, done.stderr
    uri = snapshot(tmp_path / "runs/a")["datasets"]["code"]["uri"]
    assert uri == f"hf://datasets/org/data@{hub.refs['datasets/org/data']['main']}/train"


@pytest.mark.slow
def test_a_folder_of_the_hubs_cache_and_a_name_on_the_command_line(hub, run_wmtp, config, tmp_path):
    done = run_wmtp("generate", "tiny/llama", "--prompt", "def", "--max-new-tokens", "2", "--json")
    assert done.returncode == 0, done.stderr
    cached = tmp_path / "hf/hub/models--tiny--llama"
    again = run_wmtp("generate", cached, "--prompt", "def", "--max-new-tokens", "2", "--json", HF_HUB_OFFLINE="1")
    assert json.loads(again.stdout)["text"] == json.loads(done.stdout)["text"]
    done = run_wmtp("run", config(cached), "--run-name", "a", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "/snapshots/" in snapshot(tmp_path / "runs/a")["models"]["base"]["uri"]
    missing = run_wmtp("generate", "tiny/lama", "--prompt", "def")
    assert missing.returncode == 2
    assert "no such model" in missing.stderr
    assert "nor is there a folder" in missing.stderr


def test_fetch_and_push_of_a_folder(hub, run_wmtp, tmp_path, folder):
    done = run_wmtp("fetch", "hf://tiny/llama", tmp_path / "here", anew=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert run_wmtp("push", folder, "hf://ada/copy").returncode == 2
    done = run_wmtp("push", folder, "hf://ada/copy", anew=True, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert hub.files("models/ada/copy")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_checkpoints_are_not_kept_on_the_hub(run_wmtp, config):
    done = run_wmtp("check", config("tiny/llama"), "--set", "checkpoints.uri=hf://ada/run")
    assert done.returncode == 2
    assert "checkpoints.uri: hf:// keeps no checkpoints" in done.stderr


@pytest.mark.slow
def test_a_run_is_pushed_with_its_card_and_never_by_default(hub, run_wmtp, config, tmp_path):
    path = config("tiny/llama")
    assert run_wmtp("run", path, "--run-name", "a", HF_TOKEN=TOKEN).returncode == 0
    assert not hub.asked("POST")
    done = run_wmtp("push", tmp_path / "runs/a", "hf://ada/mine", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    there = hub.files("models/ada/mine")
    assert there["mtp_heads.safetensors"] == (tmp_path / "runs/a/model/mtp_heads.safetensors").read_bytes()
    card = there["README.md"].decode()
    assert "base_model: tiny/llama\n" in card
    assert "- state of the run: finished" in card
    assert str(tmp_path / "runs") not in card
    done = run_wmtp("generate", "ada/mine", "--prompt", "def", "--max-new-tokens", "2", "--speculative")
    assert done.returncode == 0, done.stderr


def test_a_run_pushes_at_its_end_where_it_is_told_to(hub, run_wmtp, config, tmp_path):
    words = ("run", config("tiny/llama"), "--set", "run.push_to=hf://ada/end")
    done = run_wmtp(*words, "--run-name", "a")
    assert done.returncode == 2
    assert "run.push_to: hf://ada/end: to push there, log in with a token that may write" in done.stderr
    assert not (tmp_path / "runs/a").exists()
    done = run_wmtp(*words, "--run-name", "a", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "pushed to hf://ada/end" in done.stderr
    assert {"README.md", "model.safetensors", "mtp_heads.json"} <= hub.files("models/ada/end").keys()
    assert hub.private["models/ada/end"] is True


@pytest.mark.slow
def test_a_push_that_fails_after_several_processes_leaves_the_run_whole_and_names_the_way(hub, run_wmtp, config, tmp_path):
    words = ("run", config("tiny/llama"), "--set", "run.push_to=hf://ada/end", "--set", "launcher.processes=2")
    hub.fault = lambda handler: "/commit/" in handler.path and (handler.answer(503) or True)
    done = run_wmtp(*words, "--run-name", "a", HF_TOKEN=TOKEN)
    assert done.returncode == 1, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: run.push_to: hf://ada/end: the hub at http://127.0.0.1")
    run = tmp_path / "runs/a"
    assert (run / "model/mtp_heads.safetensors").is_file()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    way = error.partition("; push it with: wmtp ")[2].split()
    assert way == ["push", str(run), "hf://ada/end"]
    hub.fault = lambda handler: False
    hub.requests.clear()
    assert run_wmtp(*way, HF_TOKEN=TOKEN).returncode == 0
    there = hub.files("models/ada/end")
    assert there["mtp_heads.safetensors"] == (run / "model/mtp_heads.safetensors").read_bytes()
    done = run_wmtp(*words, "--run-name", "b", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert len(hub.asked("/commit/")) == 2, "rank 0 alone pushes, once"

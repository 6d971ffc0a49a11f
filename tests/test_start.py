"""``wmtp start``: from an empty folder and a bucket to a trained model, through signals and damaged files."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import HELD, environment

from wmtp.cli import main
from wmtp.config.load import load_config
from wmtp.errors import WMTPError
from wmtp.launchers.samples import latest_sample
from wmtp.signals import stopped_by_sigterm
from wmtp.startup.machine import limited_runtime
from wmtp.startup.prepare import needed, verify
from wmtp_storage.testing import s3_server as s3_server


def write_model(folder, vocab_size=258, seed=0):
    import torch

    from wmtp.models.config import ScratchModel

    shape = {"hidden_size": 32, "layers": 2, "attention_heads": 2, "intermediate_size": 48, "max_positions": 128}
    loaded = ScratchModel(vocab_size=vocab_size, **shape).build().load(None, dtype=torch.float32, seed=seed)
    loaded.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def container(recipe, tmp_path, monkeypatch):
    """An empty working folder, as /app is; where the recipe's run goes."""
    folder = tmp_path / "app"
    folder.mkdir()
    monkeypatch.chdir(folder)
    text = recipe.read_text().replace(f'output_dir = "{tmp_path}/runs"', 'name = "first"')
    recipe.write_text(text)
    return folder


def from_bucket(recipe, uri):
    """The recipe with model and data from there."""
    text = recipe.read_text()
    start, end = text.index("[models.base]"), text.index("[models.base.heads]")
    text = f'{text[:start]}[models.base]\ntype = "hf"\nuri = "{uri}/tiny"\n{text[end:]}'
    return text.replace(f"{recipe.parent}/code.jsonl", f"{uri}/code.jsonl")


def test_from_a_bucket_to_a_model(container, recipe, model, s3_server, wmtp, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://{s3_server.bucket()}/wmtp"
    from wmtp.config.places import build_backends
    from wmtp.config.schema import StorageConfig

    storage = build_backends(StorageConfig())["s3"]
    storage.push(model, f"{uri}/tiny")
    storage.push(recipe.parent / "code.jsonl", f"{uri}/code.jsonl")
    monkeypatch.setenv("WMTP_CONFIG", from_bucket(recipe, uri))
    done = wmtp("start", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["status"], answer["steps"]) == ("finished", 40)
    assert (container / "runs" / "first" / "model" / "config.json").is_file()
    assert {path.name for path in container.iterdir()} == {"models", "datasets", "inputs", "runs"}
    assert list((container / "models").rglob("model.safetensors"))
    snapshot = load_config(container / "runs" / "first" / "config.toml")
    assert snapshot.models["base"].loader.uri == str(container / "inputs/models.base")  # wherever the cache has it
    assert snapshot.datasets["code"].uri == str(container / "inputs/datasets.code.jsonl")
    assert "models: base whole" in done.stderr
    assert latest_sample(done.stderr.splitlines())["disk free (GiB)"] > 0


def test_a_dry_run_fetches_nothing_and_imports_no_torch(container, recipe):
    recipe.write_text(from_bucket(recipe, "s3://bucket/wmtp"))
    code = (
        f"import sys\nfrom wmtp.cli import main\nrc = main(['start', '--dry-run', {str(recipe)!r}])\n"
        "heavy = {'torch', 'transformers', 'mlflow'} & set(sys.modules)\nsys.exit(f'imports {heavy}' if heavy else rc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  models\.base +s3://bucket/wmtp/tiny$", done.stdout, re.MULTILINE)
    assert not list(container.iterdir())


def test_a_preempted_container_saves_and_goes_on(container, recipe, preloaded):
    process = preloaded.start(4, "start", recipe, "--json", code=HELD)
    metrics = container / "runs" / "first" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    answer = json.loads(out)
    assert (answer["status"], answer["signal"]) == ("interrupted", "SIGTERM")
    assert Path(answer["checkpoint"]).is_dir()
    done = preloaded.run("start", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    again = json.loads(done.stdout)
    assert (again["status"], again["steps"]) == ("finished", 40)


def test_a_run_has_its_time_and_no_more(monkeypatch, caplog):
    monkeypatch.setenv("WMTP_MAX_RUNTIME", "0.1")
    with pytest.raises(KeyboardInterrupt), stopped_by_sigterm(), limited_runtime():
        threading.Event().wait(60)
    monkeypatch.setenv("WMTP_MAX_RUNTIME", "600")
    with limited_runtime():
        pass
    for timer in (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)):
        timer.join(60)
        assert not timer.is_alive(), "a run that has ended is not stopped any more"


def test_a_signal_before_training_ends_it(container, recipe, tmp_path):
    """Process 1 of a container hears SIGTERM only where it asked for it."""
    code = (
        "import os, signal, sys, threading\nfrom wmtp.startup import start\n"
        "start.check_machine = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or threading.Event().wait(30)\n"
        f"from wmtp.cli import main\nsys.exit(main(['start', {str(recipe)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=300)
    assert (done.returncode, done.stderr) == (143, "error: interrupted\n")


@pytest.mark.parametrize("encode", [str, lambda text: "base64:" + base64.b64encode(text.encode()).decode()])
def test_the_config_may_be_in_the_environment(container, recipe, monkeypatch, capsys, encode):
    monkeypatch.setenv("WMTP_CONFIG", encode(recipe.read_text()))
    assert main(["start", "--dry-run", "--set", "launcher.processes=2"]) == 0
    assert "processes    2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "name a TOML file, or set WMTP_CONFIG"), ("[run", "WMTP_CONFIG: this is not TOML"),
     ("base64:!", "WMTP_CONFIG: this is not TOML"), ("", "models: required, and missing")],
)  # fmt: skip
def test_a_wrong_environment(container, monkeypatch, capsys, text, message):
    if text is not None:
        monkeypatch.setenv("WMTP_CONFIG", text)
    assert main(["start"]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_fetched(container, recipe, capsys):
    (container / "runs").write_text("a file")
    assert main(["start", str(recipe), "--set", "run.output_dir=runs/deep"]) == 2
    assert "which is a file" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "inf"])
def test_a_limit_that_is_none(container, recipe, monkeypatch, capsys, value):
    monkeypatch.setenv("WMTP_MAX_RUNTIME", value)
    assert main(["start", str(recipe)]) == 2
    assert "WMTP_MAX_RUNTIME" in capsys.readouterr().err


def test_where_things_are_fetched_to(recipe, tmp_path):
    text = from_bucket(recipe, "s3://bucket/wmtp")
    recipe.write_text(text)
    config = load_config(recipe)
    home = Path("/app")
    assert [(f.key, f.uri, str(f.folder)) for f in needed(config, home)] == [
        ("models.base", "s3://bucket/wmtp/tiny", "/app/models"),
        ("datasets.code", "s3://bucket/wmtp/code.jsonl", "/app/datasets"),
    ]
    config = load_config([recipe, {"storage": {"cache_dir": "/mnt/cache"}}])
    assert {str(fetch.folder) for fetch in needed(config, home)} == {"/mnt/cache"}


def two_models(base, other, name="ref", trainer="rho1-wmtp"):
    table = {
        "models": {"base": {"type": "hf", "uri": str(base)}, name: {"type": "hf", "uri": str(other)}},
        "datasets": {"code": {"type": "python-source"}}, "trainer": {"type": trainer},
    }  # fmt: skip
    return load_config(table)


@pytest.mark.parametrize(("name", "trainer"), [("ref", "rho1-wmtp"), ("rm", "critic-wmtp")])
def test_models_may_have_vocabularies_of_other_sizes(model, tmp_path, name, trainer):
    """A reference's may be padded to another size, and a reward model has one of its own; the run compares tokenizers."""
    verify(two_models(model, write_model(tmp_path / "other", vocab_size=300), name, trainer))


def test_a_model_that_the_trainer_does_not_need_is_not_looked_at(model, tmp_path):
    config = two_models(model, tmp_path / "nowhere", "ref", "baseline-mtp")
    verify(config)


@pytest.mark.parametrize("damage", ["cut", "grown", "header", "empty", "shard", "json", "gone"])
def test_a_model_that_is_not_whole(model, tmp_path, damage):
    """A cache that was half filled by a run that died, or a copy that stopped."""
    folder = write_model(tmp_path / "damaged")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    if damage == "shard":
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})
        )
    elif damage == "json":
        (folder / "config.json").write_text('{"vocab_size": 258')
    elif damage == "gone":
        folder = tmp_path / "nowhere"
    else:
        file.write_bytes({"cut": data[:-1], "grown": data + b"x", "header": data[:20], "empty": b""}[damage])
    with pytest.raises(WMTPError, match=r"damaged|nowhere") as error:
        verify(two_models(model, folder))
    assert "models" in str(error.value)
    assert "\n" not in str(error.value)


def test_samples_survive_a_log():
    assert latest_sample(["wmtp-sample {", "wmtp-sample []", 'x wmtp-sample {"a": 1}', "wmtp-sample nope"]) == {"a": 1.0}
    assert latest_sample([]) == {}


def test_gpus_are_measured_as_nvidia_smi_says(tmp_path, monkeypatch):
    from wmtp.launchers.samples import sample

    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, 87, 1024, 81920, 300.5'\necho '1, [N/A], 10, 81920, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    values = sample(tmp_path)
    assert values["gpu/0/utilization (%)"] == 87
    assert values["gpu/1/memory used (MiB)"] == 10
    assert "gpu/1/utilization (%)" not in values

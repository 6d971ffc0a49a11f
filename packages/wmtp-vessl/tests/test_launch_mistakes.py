"""Configs and settings that ``wmtp launch`` refuses, or warns of."""

import os
import subprocess
import sys

import pytest
from vessl_service import DIGEST, LAUNCHER, RECIPE

from wmtp_vessl.config import seconds


def edited(files, old, new):
    assert old in LAUNCHER + RECIPE
    files.write(LAUNCHER.replace(old, new), RECIPE.replace(old, new))


MISTAKES = {
    "no such organization": (
        "gpus = 4",
        'gpus = 4\norganization = "labb"',
        "launcher.organization: VESSL has no 'labb' for you; there are: lab, other",
    ),
    "no such project": (
        "gpus = 4",
        'gpus = 4\nproject = "mpt"',
        "launcher.project: VESSL has no 'mpt' for you; there are: mtp",
    ),
    "no such cluster": (
        '"seoul"',
        '"soul"',
        "launcher.cluster: VESSL has no 'soul' for you; there are: oregon, seoul",
    ),
    "no such preset": (
        '"a100-4"',
        '"v1-a100-4-pod"',
        "no 'v1-a100-4-pod'; there are: a100-1 (1 × A100), a100-4 (4 × A100), cpu (0 GPUs)",
    ),
    "too few GPUs": (
        '"a100-4"',
        '"a100-1"',
        "launcher.preset: a100-1 has 1 GPUs, and launcher.gpus = 4",
    ),
    "a secret in clear": (
        'NCCL_DEBUG = "WARN"',
        'WANDB_API_KEY = "12345"',
        "launcher.env: WANDB_API_KEY looks like a secret",
    ),
    "a password in an address": (
        'NCCL_DEBUG = "WARN"',
        'DB = "postgres://me:pass@host/x"',
        "looks like a secret",
    ),
    "a secret's value for its name": (
        '"aws-id"',
        '"AKIAABCDEFGHIJKLMNOP"',
        "must be the name of a secret on VESSL",
    ),
    "paths outside": (
        "s3://wmtp/models/llama",
        "/home/me/llama",
        "models.base.uri: '/home/me/llama' is not in the container",
    ),
    "a second path of a model": (
        "s3://wmtp/models/llama",
        's3://wmtp/models/llama"\nbase_uri = "/home/me/base',
        "models.base.base_uri: '/home/me/base' is not in the container",
    ),
    "a model pushed outside": (
        'name = "first"',
        'push_to = "/home/me/model"',
        "run.push_to: '/home/me/model' is not in the container",
    ),
    "paths that climb": (
        "s3://wmtp/models/llama",
        "/app/../etc",
        "is not in the container",
    ),
    "output outside": (
        'name = "first"',
        'output_dir = "/data/runs"',
        "run.output_dir: '/data/runs' is not in the container",
    ),
    "more processes than GPUs": (
        "gpus = 4",
        "gpus = 4\nprocesses = 8",
        "launcher.processes: 8 processes need 8 GPUs, and gpus = 4",
    ),
    "graphs for several GPUs": (
        "[launcher.env]",
        "[devices]\ncuda_graphs = true\n[launcher.env]",
        "launcher.gpus: 4, each for a process, and devices.cuda_graphs records the passes of one process; write gpus = 1",
    ),
    "a variable of the launcher": (
        'NCCL_DEBUG = "WARN"',
        'WMTP_CONFIG = "x"',
        "launcher.env: WMTP_CONFIG is set by the launcher",
    ),
    "an image with a space": (
        "registry.example/wmtp",
        "registry.example/wm tp",
        "launcher.image",
    ),
    "a mount of nothing": (
        "[launcher.env]",
        '[launcher.mounts]\n"/data" = "nfs"\n[launcher.env]',
        "launcher.mounts: \"/data\": 'nfs' is none of the forms",
    ),
    "a relative mount": (
        "[launcher.env]",
        '[launcher.mounts]\n"data" = "nfs://h/p"\n[launcher.env]',
        "'data' is no folder of the container",
    ),
    "a cache from nowhere": (
        "[launcher.env]",
        '[launcher.cache]\nmode = "mount"\n[launcher.env]',
        "launcher.cache.source: required",
    ),
    "a duration": (
        "gpus = 4",
        'gpus = 4\nmax_runtime = "forever"',
        "must be a duration such as '24h'",
    ),
    "no cluster": (
        'cluster = "seoul"',
        "",
        "launcher.cluster: required",
    ),
    "a mistyped key": (
        "gpus = 4",
        "gpus = 4\npresets = 1",
        "launcher.presets: unknown key; did you mean 'preset'?",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(wmtp, files, api, what):
    old, new, message = MISTAKES[what]
    edited(files, old, new)
    code, out, err = wmtp("launch", "--dry-run=server", *files)
    assert (code, out) == (2, ""), err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert any(message in line for line in errors), err
    assert "Traceback" not in err
    assert not api.bodies
    if "12345" in new:
        assert "12345" not in err


def test_no_token(wmtp, files, api, monkeypatch):
    monkeypatch.delenv("VESSL_ACCESS_TOKEN")
    code, _, err = wmtp("launch", *files)
    assert code == 3
    assert "error: no VESSL token: set VESSL_ACCESS_TOKEN" in err


def test_a_wrong_token_is_refused_and_not_shown(wmtp, files, api, monkeypatch):
    monkeypatch.setenv("VESSL_ACCESS_TOKEN", "wrong-token-0815")
    code, _, err = wmtp("launch", *files)
    assert code == 3
    assert "does not accept the token (401 Unauthorized bad header Token ***" in err
    assert "0815" not in err


def test_the_settings_of_vessl_configure(wmtp, files, api, monkeypatch, tmp_path):
    for name in ("VESSL_ACCESS_TOKEN", "VESSL_DEFAULT_ORGANIZATION", "VESSL_DEFAULT_PROJECT"):
        monkeypatch.delenv(name)
    folder = tmp_path / "home" / ".vessl"
    folder.mkdir(parents=True)
    (folder / "config").write_text(
        f'[user]\naccess_token = "{api.token}"\ndefault_organization = "lab"\ndefault_project = "mtp"\n')  # fmt: skip
    assert wmtp("launch", *files)[0] == 0
    (folder / "config").write_text("[user\n")
    code, _, err = wmtp("launch", *files)
    assert code == 3
    assert "cannot be read" in err


def test_a_token_is_not_sent_unencrypted(wmtp, files, api, monkeypatch):
    monkeypatch.setenv("VESSL_API_HOST", "http://api.example.com")
    code, _, err = wmtp("launch", *files)
    assert code == 2
    assert "write https://api.example.com" in err


def test_an_image_without_digest_is_a_warning(wmtp, files, api):
    edited(files, f"@{DIGEST}", ":latest")
    code, _, err = wmtp("launch", "--dry-run", *files)
    assert code == 0
    assert "warning: launcher.image: registry.example/wmtp:latest is named without a digest" in err
    assert "write registry.example/wmtp@sha256:…" in err
    edited(files, f"registry.example/wmtp@{DIGEST}", "registry.example:5000/wmtp")
    _, _, err = wmtp("launch", "--dry-run", *files)
    assert "write registry.example:5000/wmtp@sha256:…" in err


def test_what_is_allowed_and_yet_unwise(wmtp, files):
    files.write(LAUNCHER.partition("[launcher.secrets]")[0].replace("gpus = 4", 'gpus = 4\nmounts = { "/x" = "volume://a/b" }'),
                RECIPE.replace("s3://wmtp/models/llama", "/app/llama").partition("[checkpoints]")[0])  # fmt: skip
    code, _, err = wmtp("launch", "--dry-run", *files)
    assert code == 0
    said = [line for line in err.splitlines() if line.startswith("warning: ")]
    for part in ("refuse mounted volumes", "'/app/llama' must be in the image", "are lost with it", "no AWS_… variable"):
        assert any(part in line for line in said), (part, err)


def test_a_mounted_file_need_not_be_in_the_image(wmtp, files):
    files.write(LAUNCHER.replace("gpus = 4", 'gpus = 4\nmounts = { "/x" = "hostpath:///x" }'),
                RECIPE.replace("s3://wmtp/models/llama", "file:///x/llama"))  # fmt: skip
    code, _, err = wmtp("launch", "--dry-run", *files)
    assert (code, "must be in the image" in err) == (0, False), err


def test_check_is_light_and_offline(files):
    code = (
        "import sys\nfrom wmtp.cli import main\n"
        f"rc = main(['check', *{list(files)!r}])\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'httpx', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else rc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "vessl" in done.stdout


@pytest.mark.parametrize(("text", "value"), [("24h", 86400), ("1d12h", 129600), ("90m", 5400), ("1h30m5s", 5405)])
def test_durations(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "h", "24", "1.5h", "0m", "-1h", "1m1h"])
def test_no_durations(text):
    with pytest.raises(ValueError):
        seconds(text)

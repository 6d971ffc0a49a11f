"""``wmtp launch``, as a user types it, against a server that plays the service."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import tomli
import yaml
from vessl_service import DIGEST, LAUNCHER, RECIPE

from wmtp.config.load import load_config
from wmtp.runs import records
from wmtp_vessl.config import seconds
from wmtp_vessl.render import KEYS


def edited(files, old, new):
    assert old in LAUNCHER + RECIPE
    files.write(LAUNCHER.replace(old, new), RECIPE.replace(old, new))


def test_a_dry_run_prints_the_run_yaml_offline(wmtp, files, monkeypatch):
    monkeypatch.setenv("VESSL_API_HOST", "http://127.0.0.1:9")  # nobody is there
    code, out, err = wmtp("launch", "--on", "vessl", "--dry-run", *files)
    assert (code, err) == (0, "")
    spec = yaml.safe_load(out)
    assert set(spec) <= set(KEYS)
    assert list(spec) == [key for key in KEYS if key in spec]
    assert spec["name"] == "first"
    assert spec["resources"] == {"cluster": "seoul", "preset": "a100-4"}
    assert spec["image"] == f"registry.example/wmtp@{DIGEST}"
    assert spec["run"] == [{"command": "exec wmtp start", "workdir": "/app"}]
    assert spec["env"]["AWS_SECRET_ACCESS_KEY"] == {"secret": "aws-key"}
    assert spec["env"]["TOKENIZERS_PARALLELISM"] == "false"
    assert tomli.loads(spec["env"]["WMTP_CONFIG"])["launcher"] == {"type": "local", "processes": 4}
    assert spec["termination_protection"] is False
    assert '\n    type = "baseline-mtp"\n' in out  # the config is there to be read
    assert wmtp("launch", "--on", "vessl", "--dry-run", *files)[1] == out


def test_what_the_container_gets_is_the_config_with_another_launcher(wmtp, files, tmp_path):
    spec = yaml.safe_load(wmtp("launch", "--dry-run", *files)[1])
    inside = load_config(tomli.loads(spec["env"]["WMTP_CONFIG"]))
    outside = load_config(list(files))
    assert inside.launcher.type == "local"
    assert (inside.models, inside.trainer, inside.train, inside.run) == (
        outside.models, outside.trainer, outside.train, outside.run)  # fmt: skip


@pytest.mark.parametrize("odd", ["a\x85b", "a\x85b\nc", "\u2028", "\u00e9\U0001f642\x07 # x: 'y' \"z\"\n  indented\ttab "])
def test_every_character_comes_through(wmtp, files, odd):
    quoted = json.dumps(odd, ensure_ascii=False)
    code, out, _ = wmtp("launch", "--dry-run", *files, "--set", f"launcher.env.ODD={quoted}", "--set", f"run.tags=[{quoted}]")
    spec = yaml.safe_load(out)
    assert code == 0
    assert spec["env"]["ODD"] == odd
    assert odd in spec["tags"]
    assert tomli.loads(spec["env"]["WMTP_CONFIG"])["run"]["tags"] == [odd]


def test_every_key_of_the_yaml_can_be_reached(wmtp, files):
    files.write(LAUNCHER.replace("[launcher.env]", """
description = "A run"
tags = ["mine"]
image_credential = "registry"
spot = true
node_names = ["n1"]
interactive = true
max_runtime = "1d12h"
service_account = "trainer"
termination_protection = true
ports = [{ name = "tensorboard", port = 6006 }]
[launcher.imports]
"/app/models" = "volume://fast/models"
[launcher.mounts]
"/data" = { nfs = { server = "10.0.0.1", path = "/data" } }
[launcher.exports]
"/app/checkpoints" = { s3 = { bucket = "wmtp", prefix = "out", credential_name = "aws" } }
[launcher.cache]
mode = "mount"
source = "hostpath:///mnt/cache"
[launcher.env]"""))  # fmt: skip
    code, out, err = wmtp("launch", "--dry-run", *files)
    assert (code, err) == (0, "")
    spec = yaml.safe_load(out)
    assert list(spec) == list(KEYS)
    assert spec["image"] == {"url": f"registry.example/wmtp@{DIGEST}", "credential_name": "registry"}
    assert spec["mount"] == {"/data": {"nfs": {"server": "10.0.0.1", "path": "/data"}}, "/app/cache": "hostpath:///mnt/cache"}
    assert spec["import"] == {"/app/models": "volume://fast/models"}
    assert spec["interactive"] == {"max_runtime": "1d12h", "jupyter": {"idle_timeout": "2h"}}
    assert spec["ports"] == [{"name": "tensorboard", "type": "http", "port": 6006}]
    assert spec["env"]["WMTP_MAX_RUNTIME"] == str(36 * 3600)
    assert tomli.loads(spec["env"]["WMTP_CONFIG"])["storage"]["cache_dir"] == "/app/cache"


def test_a_launch_shows_what_it_sends_and_keeps_a_record(wmtp, files, api, tmp_path):
    code, out, err = wmtp("launch", "--on", "vessl", *files, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["run"] == "1000"
    (body,) = api.bodies
    assert set(body) == {"yaml_spec"}
    assert yaml.safe_load(body["yaml_spec"]) == yaml.safe_load(err)
    assert body["yaml_spec"] == yaml.dump(yaml.safe_load(err), default_flow_style=False, sort_keys=False)
    (path,) = (tmp_path / "state" / "launches").glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["run"] == "1000"
    assert kept["details"]["image_digest"] == DIGEST
    assert kept["digest"] == answer["digest"]
    assert kept["sha256"] == hashlib.sha256(err.encode()).hexdigest()
    assert set(kept["git"] or {"commit": 1, "changed": 1}) == {"commit", "changed"}
    assert api.token not in path.read_text() + out + err


def test_the_same_plan_is_not_started_twice(wmtp, files, api):
    assert wmtp("launch", *files)[0] == 0
    code, _, err = wmtp("launch", *files)
    assert code == 2
    assert "running already, as 1000" in err
    assert "--again" in err
    assert len(api.bodies) == 1
    api.runs[1000]["status"] = "failed"
    assert wmtp("launch", *files)[0] == 0
    assert wmtp("launch", *files, "--again")[0] == 0
    assert wmtp("launch", *files, "--set", "run.seed=1")[0] == 0
    assert len(api.bodies) == 4


def test_nor_from_another_machine(wmtp, files, api, monkeypatch, tmp_path):
    assert wmtp("launch", *files)[0] == 0
    monkeypatch.setenv("WMTP_STATE_DIR", str(tmp_path / "other"))
    code, _, err = wmtp("launch", *files)
    assert code == 2
    assert "as 1000" in err
    assert len(api.bodies) == 1


def test_a_lost_answer_starts_no_second_run(wmtp, files, api):
    api.fault("POST", "create_from_yaml", "lost")
    code, out, err = wmtp("launch", *files, "--json")
    assert code == 0, err
    assert json.loads(out)["run"] == "1000"
    assert "the answer was lost" in err
    assert len(api.bodies) == 1


def test_a_lost_answer_and_a_service_that_is_gone(wmtp, files, api):
    """The run may be there; the next launch finds it instead of starting another."""
    api.fault("POST", "create_from_yaml", "lost")
    find = api.answer

    def gone(method, path, query, body):
        answer = find(method, path, query, body)
        if path.endswith("create_from_yaml"):
            api.fault("GET", "run_executions", (503, {"Retry-After": "0"}, {}), times=6)
        return answer

    api.answer = gone
    assert wmtp("launch", *files)[0] == 4
    api.answer = find
    code, _, err = wmtp("launch", *files)
    assert code == 2
    assert "running already, as 1000" in err
    assert len(api.bodies) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_the_request_for_a_run_is_never_repeated(wmtp, files, api, status):
    api.fault("POST", "create_from_yaml", (status, {"Retry-After": "0"}, {"message": "sorry"}))
    code, _, err = wmtp("launch", *files)
    assert code == 4
    assert "sorry" in err
    assert [r for r in api.requests if r[1].endswith("create_from_yaml")] == [
        ("POST", "/api/v1/organizations/lab/projects/mtp/run/spec/create_from_yaml")]  # fmt: skip
    assert wmtp("launch", *files)[0] == 0


def test_a_refused_yaml_is_the_users_mistake(wmtp, files, api):
    api.fault("POST", "create_from_yaml", (400, {}, {"code": "InvalidRunSpec", "message": "no such field: commmand"}))
    code, _, err = wmtp("launch", *files)
    assert code == 2
    assert "no such field: commmand" in err
    assert not records.records()


def test_two_at_once_start_one(files, api):
    command = [sys.executable, "-m", "wmtp", "launch", "--on", "vessl", *files]
    api.fault("GET", "me", (503, {"Retry-After": "1"}, {}), times=2)  # so that they meet
    both = [subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    assert len(api.bodies) == 1


def test_the_servers_own_check(wmtp, files, api):
    code, out, err = wmtp("launch", "--dry-run=server", *files)
    assert code == 0, err
    assert yaml.safe_load(out)["name"] == "first"
    assert not api.bodies
    error = {"attribute": "resources.preset", "message": "is gone"}
    api.validator = {"validated": False, "form_errors": {"validation_errors": [error]}}
    code, out, err = wmtp("launch", "--dry-run=server", *files)
    assert (code, out) == (2, "")
    assert "resources.preset: is gone" in err


def test_a_server_without_a_validator(wmtp, files, api):
    api.fault("POST", "sync_yaml", (404, {}, {}))
    code, _, err = wmtp("launch", "--dry-run=server", *files)
    assert code == 0
    assert "warning: VESSL's own validator gave no answer" in err


def test_options_may_stand_anywhere(wmtp, files):
    one, two = files
    for words in (["--dry-run", one, two], [one, "--dry-run", two], [one, two, "--on", "vessl", "--dry-run"]):
        assert wmtp("launch", *words)[0] == 0


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


def test_on_names_the_launcher(wmtp, files):
    code, _, err = wmtp("launch", "--dry-run", files.folder / "recipe.toml", "--on", "vessl")
    assert code == 2
    assert "launcher.preset: required, and missing" in err
    code, _, err = wmtp("launch", "--dry-run", *files, "--on", "vesl")
    assert code == 2
    assert "no plugin provides 'vesl'; did you mean 'vessl'?" in err


def test_run_does_not_launch(wmtp, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = wmtp("run", *files)
    assert code == 2
    assert "wmtp launch --on vessl" in err
    assert not (tmp_path / "runs" / "first").exists()


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


@pytest.mark.parametrize("answer", [{"message": "log in"}, {"results": "none"}])
def test_an_answer_that_is_no_list_of_runs_starts_nothing(wmtp, files, api, answer):
    """That the same plan is not running already does not follow from it."""
    find = api.answer
    api.answer = lambda method, path, *rest: (200, answer) if path.endswith("run_executions") else find(method, path, *rest)
    code, _, err = wmtp("launch", *files)
    assert code == 4
    assert "is no list of them" in err
    assert api.bodies == []

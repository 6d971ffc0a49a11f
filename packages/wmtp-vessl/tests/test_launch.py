"""``wmtp launch``, as a user types it, against a server that plays the service."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import tomli
import yaml
from vessl_service import DIGEST, LAUNCHER

from wmtp.config.load import load_config
from wmtp.runs import records
from wmtp_vessl.render import KEYS


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


@pytest.mark.parametrize("answer", [{"message": "log in"}, {"results": "none"}])
def test_an_answer_that_is_no_list_of_runs_starts_nothing(wmtp, files, api, answer):
    """That the same plan is not running already does not follow from it."""
    find = api.answer
    api.answer = lambda method, path, *rest: (200, answer) if path.endswith("run_executions") else find(method, path, *rest)
    code, _, err = wmtp("launch", *files)
    assert code == 4
    assert "is no list of them" in err
    assert api.bodies == []

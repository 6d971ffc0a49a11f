"""VESSL Cloud Jobs, with a program in the place of vesslctl that keeps its jobs in a file."""

import base64
import json
import shlex

import pytest
import tomli
from vessl_service import LAUNCHER

from wmtp_vessl.jobs import newer_lines

JOBS = "\n".join(
    line for line in LAUNCHER.partition("[launcher.secrets]")[0].splitlines() if not line.startswith("cluster")
).replace("[launcher.env]", """
backend = "jobs"
[launcher.mounts]
"/app/models" = "object://models-vol"
[launcher.env]""").replace('"a100-4"', '"a100x4"')  # fmt: skip


@pytest.fixture
def jobs(vesslctl, files):
    files.write(JOBS)
    return vesslctl


def test_the_plan_is_a_command_line(wmtp, files, jobs, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = wmtp("launch", "--dry-run", *files)
    assert (code, err) == (0, "")
    words = shlex.split(out, comments=True)
    assert words[:3] == ["vesslctl", "job", "create"]
    assert words[words.index("--object-volume") + 1] == "models-vol:/app/models"
    assert words[words.index("--cmd") + 1] == "cd /app && exec wmtp start"
    assert '# type = "baseline-mtp"' in out
    (text,) = [word.partition("base64:")[2] for word in words if word.startswith("WMTP_CONFIG=")]
    assert tomli.loads(base64.b64decode(text).decode())["trainer"] == {"type": "baseline-mtp"}


def test_a_job_from_launch_to_end(wmtp, files, jobs):
    code, out, err = wmtp("launch", *files, "--json")
    assert code == 0, err
    assert json.loads(out)["run"] == "job-0"
    assert jobs()[0]["argv"] == shlex.split(err.partition("warning")[0], comments=True)[1:]
    code, _, err = wmtp("launch", *files)
    assert code == 2
    assert "running already, as job-0" in err
    assert wmtp("logs", "job-0", "--follow")[1].splitlines() == [f"line {i}" for i in range(5)]
    assert json.loads(wmtp("status", "job-0", "--json")[1])["state"] == "succeeded"
    code, out, _ = wmtp("launch", *files, "--json")
    assert json.loads(out)["run"] == "job-1"
    assert wmtp("cancel", "first")[1] == "run job-1: terminated\n"


@pytest.mark.parametrize(
    ("said", "code", "message"),
    [
        ("Error: not logged in, run vesslctl auth login", 3, "run 'vesslctl auth login'"),
        ("Error: INTERNAL_ERROR", 4, "INTERNAL_ERROR"),
    ],
)
def test_failures(wmtp, files, jobs, monkeypatch, said, code, message):
    monkeypatch.setenv("STUB_FAILS", said)
    done, _, err = wmtp("launch", *files)
    assert done == code
    assert message in err


def test_no_program(wmtp, files, jobs, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = wmtp("launch", *files)
    assert code == 2
    assert "needs the program vesslctl" in err


def test_an_unknown_resource_spec(wmtp, files, jobs):
    files.write(JOBS.replace('"a100x4"', '"h100x4"'))
    code, _, err = wmtp("launch", *files)
    assert code == 2
    assert "there are: a100x1, a100x4" in err


def test_what_jobs_do_not_have(wmtp, files, jobs):
    files.write(JOBS.replace("gpus = 4", "gpus = 4\nspot = true"))
    code, _, err = wmtp("launch", "--dry-run", *files)
    assert code == 2
    assert 'launcher.spot: backend = "jobs" has no such thing' in err


@pytest.mark.parametrize(
    ("shown", "lines", "new", "lacks"),
    [
        ([], ["a"], ["a"], False), (["a"], ["a"], [], False), (["a"], ["a", "b"], ["b"], False),
        (["a", "b", "c"], ["b", "c", "d"], ["d"], False), (["a", "a"], ["a", "a", "a"], ["a"], False),
        (["x"], ["y"] * 1000, ["y"] * 1000, True),
    ],
)  # fmt: skip
def test_newer_lines(shown, lines, new, lacks):
    assert newer_lines(shown, lines) == (new, lacks)

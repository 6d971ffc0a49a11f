"""VESSL Cloud Jobs, with a program in the place of vesslctl that keeps its jobs in a file."""

import base64
import json
import shlex
import stat
import sys

import pytest
import tomli
from vessl_service import LAUNCHER

from wmtp_vessl.jobs import newer_lines

VESSLCTL = f"""#!{sys.executable}
import json, os, pathlib, sys
state = pathlib.Path(os.environ["STUB_STATE"])
jobs = json.loads(state.read_text()) if state.exists() else []
with open(str(state) + ".calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
words = sys.argv[1:]
if os.environ.get("STUB_FAILS"):
    sys.exit(os.environ["STUB_FAILS"])
if words[:2] == ["auth", "status"]:
    print("logged in")
elif words[:2] == ["resource-spec", "list"]:
    print(json.dumps([{{"slug": "a100x4"}}, {{"slug": "a100x1"}}]))
elif words[:2] == ["job", "create"]:
    name = words[words.index("--name") + 1]
    jobs.append({{"slug": f"job-{{len(jobs)}}", "name": name, "workloadState": "running", "argv": words, "log": []}})
    print("created")
elif words[:2] == ["job", "list"]:
    print(json.dumps(jobs))
elif words[:2] == ["job", "show"]:
    print(json.dumps(next(job for job in jobs if job["slug"] == words[2])))
elif words[:2] == ["job", "logs"]:
    job = next(job for job in jobs if job["slug"] == words[-1])
    print("".join(line + "\\n" for line in job["log"]), end="")
    job["log"].append(f"line {{len(job['log'])}}")
    if len(job["log"]) > 5:
        job["log"].pop()
        job["workloadState"] = "succeeded"
elif words[:2] == ["job", "terminate"]:
    next(job for job in jobs if job["slug"] == words[2])["workloadState"] = "terminated"
state.write_text(json.dumps(jobs))
"""

JOBS = "\n".join(
    line for line in LAUNCHER.partition("[launcher.secrets]")[0].splitlines() if not line.startswith("cluster")
).replace("[launcher.env]", """
backend = "jobs"
[launcher.mounts]
"/app/models" = "object://models-vol"
[launcher.env]""").replace('"a100-4"', '"a100x4"')  # fmt: skip


@pytest.fixture
def jobs(tmp_path, monkeypatch, files):
    program = tmp_path / "bin" / "vesslctl"
    program.parent.mkdir()
    program.write_text(VESSLCTL)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("STUB_STATE", str(tmp_path / "jobs.json"))
    files.write(JOBS)
    return lambda: json.loads((tmp_path / "jobs.json").read_text())


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

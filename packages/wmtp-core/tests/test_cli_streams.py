"""The command where its standard streams are closed or full, or the folder it stands in is gone."""

import io
import json
import os
import subprocess
import sys

import pytest
from tiny_recipe import SHORTEST_TOML

from wmtp.cli import main

WMTP = f"{sys.executable} -m wmtp"


@pytest.mark.parametrize(
    ("closed", "expected"), [("plugins >&-", 0), ("plugins <&- >&- 2>&-", 0), ("check nope.toml >&- 2>&-", 2)]
)
def test_closed_streams_change_nothing_and_are_given_to_no_file(tmp_path, closed, expected):
    done = subprocess.run(f"{WMTP} {closed}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (expected, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("write_through", [False, True])
@pytest.mark.parametrize("words", [["plugins"], ["plugins", "--json"], ["check", "recipe.toml"], ["--version"]])
def test_a_full_standard_output_is_an_error_without_a_traceback(words, write_through, monkeypatch, capsys, tmp_path):
    (tmp_path / "recipe.toml").write_text(SHORTEST_TOML)
    monkeypatch.chdir(tmp_path)
    with open("/dev/full", "w") as full:
        full.reconfigure(write_through=write_through)
        monkeypatch.setattr(sys, "stdout", full)
        assert main(words) == 1
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize(("words", "code"), [(["check", "nope.toml"], 2), (["plugins"], 0)])
def test_a_full_standard_error_leaves_the_exit_code(words, code, monkeypatch, capsys):
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(words) == code


def test_a_folder_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert main(["plugins", "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["problems"] == ["the current folder is gone: cd to one that exists, and try again"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_output_escapes_what_its_encoding_lacks(encoding, words, tmp_path):
    name = "é😀"
    (tmp_path / "recipe.toml").write_text(SHORTEST_TOML)
    command = [sys.executable, "-m", "wmtp", "check", "recipe.toml", *words, "--set", f"run.output_dir={name}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert words or done.stdout.endswith(b"ok\n")
    if words:
        assert name in json.dumps(json.loads(done.stdout), ensure_ascii=False)

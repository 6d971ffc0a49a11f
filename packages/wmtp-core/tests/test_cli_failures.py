"""Commands that end by an error: what they say, and their exit codes."""

import json
import subprocess
import sys

import pytest
from cli_recipe import PLUGIN, cli, folder, run_json

from wmtp.cli import commands, main
from wmtp.errors import ConfigError, Terminated, WMTPError

__all__ = ["folder"]


def test_exit_codes_and_errors(capsys, folder):
    code, answer, err = run_json(capsys, "--set", "launcher.do=fail", "--run-name", "f")
    assert (code, answer["error"]) == (1, "the disk is full")
    assert err.splitlines()[-1] == "error: the disk is full"
    assert json.loads((folder / "runs/f/run.json").read_text())["status"] == "failed"
    code, answer, err = run_json(capsys, "--set", "launcher.do=bug")
    assert code == 1
    assert answer["error"].startswith("here-plugin 1.5: Here.launch raised ZeroDivisionError: two lines (/")
    assert err.splitlines()[-2:] == [
        "run it again with --debug for the traceback of this error:",
        f"error: {answer['error']}",
    ]
    code, _, err = run_json(capsys, "--set", "launcher.do=bug", "--debug")
    assert code == 1
    assert "Traceback" in err
    code, answer, _ = run_json(capsys, "--set", "launcher.do=ctrl-c")
    assert (code, answer["error"]) == (130, "interrupted")
    code, answer, err = run_json(capsys, "--set", "trainer.alhpa=1", "--set", "train.max_stps=1")
    assert code == 2
    assert answer["problems"] == [
        "--set trainer.alhpa: unknown key; did you mean 'alpha'?",
        "--set train.max_stps: unknown key; did you mean 'max_steps'?",
    ]
    assert "Traceback" not in err


def test_a_config_that_the_model_refuses_does_not_take_the_name(capsys, folder):
    code, answer, _ = run_json(capsys, "--run-name", "x", "--set", "launcher.do=refuse")
    assert (code, answer["problems"]) == (2, ["a.toml: data.train.max_length: is too long for the model"])
    assert list((folder / "runs").iterdir()) == []
    assert run_json(capsys, "--run-name", "x", "--set", "launcher.do=refuse-late")[0] == 2
    assert (folder / "runs/x/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["runn"], "invalid choice: 'runn'"),
        (["run"], "name a TOML file"),
        (["check"], "name a TOML file"),
        (["eval"], "name a run, a model folder or a .gguf file"),
        (["run", "a.toml", "--resum", "auto"], "unrecognized argument: --resum"),
        (["plugins", "x"], "unrecognized argument: x"),
        (["show"], "required: NAME"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    code, out, err = cli(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_directory_that_cannot_be_written(capsys, folder):
    (folder / "runs").write_text("a file")
    code, _, err = cli(capsys, "run", "a.toml")
    assert code == 2
    assert "run.output_dir: 'runs' is a file; write the path of a folder" in err


def test_an_unforeseen_error_names_the_plugin_and_its_line(capsys, folder):
    code, _, err = cli(capsys, "run", "a.toml", "--run-name", "x", "--set", "launcher.do=break")
    assert code == 1
    line = next(n for n, text in enumerate(PLUGIN.splitlines(), start=1) if 'int("no number")' in text)
    assert err.splitlines()[-1].startswith("error: here-plugin 1.5: Here.launch raised ValueError: invalid literal")
    assert err.splitlines()[-1].endswith(f"({folder / 'site/here_plugin.py'}:{line})")
    assert not (folder / "runs/x").exists(), "nothing was trained, so the name stays free"


def test_the_process_ends_without_taking_python_apart():
    """Threads of native libraries abort a process whose interpreter goes while they run; all else of an end takes place."""
    code = """
import atexit, sys
class Torn:
    def __del__(self): print("taken apart")
sys.kept = Torn()
from wmtp.cli import run_from_shell
sys.argv = ["wmtp", "show", "no-such-thing"]
main = sys.modules["wmtp.cli"].main
def told():
    atexit.register(print, "at the end")
    sys.stdout.write("buffered, ")
    return main()
sys.modules["wmtp.cli"].main = told
run_from_shell()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "buffered, at the end\n")
    assert "no-such-thing" in done.stderr


def test_an_error_without_a_message_is_told_by_its_place(capsys, monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr("wmtp.cli.commands.plugins", fail)
    assert main(["plugins"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "AssertionError without a message at " in said[0]
    assert __file__ in said[0]
    assert "in fail: raise AssertionError" in said[0]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "/disk/file"), 1, "/disk/file: No space left on device"),
        (SystemExit(0), 1, "the work was ended by sys.exit(0)"),
        (SystemExit(2), 1, "the work was ended by sys.exit(2)"),
        (ValueError("two\nlines"), 1, "ValueError: two lines"),
        (WMTPError("it failed"), 1, "it failed"),
        (ConfigError("key: wrong"), 2, "key: wrong"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "interrupted"),
    ],
)
def test_the_exit_code_tells_what_ended_a_command(monkeypatch, capsys, error, code, said):
    def ended(_):
        raise error

    monkeypatch.setattr(commands, "plugins", ended)
    assert main(["plugins"]) == code
    assert f"error: {said}" in capsys.readouterr().err

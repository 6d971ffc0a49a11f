"""The command line and the run directory, with a real plugin whose launcher trains nothing."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wmtp
from wmtp.cli import commands, main
from wmtp.errors import ConfigError, Terminated, WMTPError

PLUGIN = """
import json, os, pathlib
import attrs, wmtp
from wmtp.launchers import Launcher

class Here(Launcher):
    def __init__(self, do):
        self.do = do

    def launch(self, config, run_dir, *, resume):
        print("a library prints")
        with open(run_dir / "launches", "a") as file:
            file.write(f"{resume}\\n")
        if self.do == "fail":
            (run_dir / "metrics.jsonl").touch()
            raise wmtp.WMTPError("the disk is full")
        if self.do in ("refuse", "refuse-late"):
            if self.do == "refuse-late":
                (run_dir / "metrics.jsonl").touch()
            raise wmtp.ConfigError("data.train.max_length: is too long for the model")
        if self.do == "bug":
            raise ZeroDivisionError("two\\nlines")
        if self.do == "ctrl-c":
            raise KeyboardInterrupt
        if self.do == "wait":
            pathlib.Path("waiting").touch()
            import time; time.sleep(60)
        if self.do == "break":
            int("no number")
        status = "interrupted" if self.do == "stop" else "finished"
        model = None if status == "interrupted" else run_dir / "model"
        return wmtp.Result(
            run_dir=run_dir, model=model, checkpoint=None, steps=3, metrics={"loss": 0.5, "x": float("nan")}, status=status
        )

@attrs.frozen(kw_only=True)
class HereConfig(wmtp.LauncherConfig):
    type = "here"
    do: str = "train"

    def build(self):
        return Here(self.do)

@attrs.frozen(kw_only=True)
class Plain(wmtp.TrainerConfig):
    \"\"\"A trainer.\"\"\"
    type = "plain"
    alpha: float = 1.0

    def build(self):
        pass

@wmtp.hookimpl
def wmtp_launchers():
    return [HereConfig]

@wmtp.hookimpl
def wmtp_trainers():
    return [Plain]
"""

TOML = """\
[models.base]
type = "scratch"
vocab_size = 300
[datasets.py]
type = "python-source"
[trainer]
type = "plain"
[launcher]
type = "here"
[train]
max_steps = 9
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "here_plugin-1.5.dist-info"
    info.mkdir(parents=True)
    (site / "here_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: here-plugin\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[wmtp]\nhere = here_plugin\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.delitem(sys.modules, "here_plugin", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(TOML)
    return tmp_path


def cli(capsys, *arguments):
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys, *arguments):
    code, out, err = cli(capsys, "run", "a.toml", "--json", *arguments)
    return code, json.loads(out), err


def test_a_run_leaves_its_directory_and_prints_the_result(capsys, folder):
    code, answer, err = run_json(capsys, "--run-name", "first", "--tags", "a, b", "--set", "trainer.alpha=2")
    assert code == 0
    run_dir = folder / "runs" / "first"
    assert answer == {
        "run_dir": str(run_dir),
        "model": str(run_dir / "model"),
        "checkpoint": None,
        "steps": 3,
        "metrics": {"loss": 0.5, "x": None},
        "status": "finished",
        "signal": None,
    }
    assert "a library prints" in err
    config = wmtp.load_config(run_dir / "config.toml")
    given = ['run.name="first"', 'run.tags=["a", "b"]', "trainer.alpha=2", f"run.output_dir={folder}/runs"]
    assert config == wmtp.load_config("a.toml", given)  # and it means the same in every folder
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["versions"]["here-plugin"] == "1.5"
    assert facts["versions"]["wmtp-core"] == wmtp.__version__
    assert facts["seed"] == 0
    assert [p.name for p in (folder / "runs").iterdir()] == ["first"]


def test_a_snapshot_runs_again(capsys, folder):
    run_json(capsys, "--run-name", "first")
    assert cli(capsys, "run", "runs/first/config.toml", "--run-name", "second")[0] == 0
    assert (folder / "runs/second/launches").read_text() == "False\n"


def test_the_result_for_people(capsys):
    code, out, _ = cli(capsys, "run", "a.toml", "--run-name", "x")
    assert code == 0
    assert "finished after 3 steps" in out
    assert "runs/x/model" in out
    assert "runs/x/metrics.jsonl" in out


def test_a_taken_name_says_the_two_ways_out(capsys):
    run_json(capsys, "--run-name", "x")
    code, answer, err = run_json(capsys, "--run-name", "x")
    assert code == 2
    assert "runs/x exists already; resume that run by --resume auto, or choose another name with --run-name" in err
    assert answer["problems"] == [err.strip().splitlines()[-1].removeprefix("error: ")]
    assert err.strip().splitlines()[-1].startswith("error: run.name: ")  # no file is to blame


def test_a_taken_name_of_a_file_is_said_with_its_line(capsys, folder):
    (folder / "named.toml").write_text('# the run\n\n[run]\nname = "x"\n')
    assert cli(capsys, "run", "a.toml", "named.toml")[0] == 0
    code, _, err = cli(capsys, "run", "a.toml", "named.toml")
    assert (code, err.splitlines()[-1].partition(" exists already")[0]) == (
        2,
        f"error: named.toml:4: run.name: {folder}/runs/x",
    )
    code, _, err = cli(capsys, "run", "a.toml", "--set", "run.name=x")
    assert err.splitlines()[-1].startswith(f"error: --set run.name: {folder}/runs/x exists already")


def test_runs_without_a_name_never_collide(capsys):
    names = {Path(run_json(capsys)[1]["run_dir"]).name for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("plain-20") for name in names)


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


def test_files_may_follow_options(capsys, folder):
    (folder / "b.toml").write_text("[train]\nmax_steps = 4\n")
    code, out, _ = cli(capsys, "check", "a.toml", "--set", "run.seed=3", "b.toml", "--json")
    assert code == 0
    assert json.loads(out)["summary"]["steps"].startswith("4 steps")
    code, _, err = cli(capsys, "report", "first", "--output", "page.html", "second")
    assert (code, err) == (2, f"error: {folder}/first: does not exist\nerror: {folder}/second: does not exist\n")


def test_check_for_people_and_its_errors(capsys):
    code, out, _ = cli(capsys, "check", "a.toml")
    assert (code, out.splitlines()[-1]) == (0, "ok")
    assert "here-plugin 1.5" in out
    code, out, err = cli(capsys, "check", "a.toml", "--set", "schedule.warmup_steps=10")
    assert (code, out) == (2, "")
    assert err == "error: --set schedule.warmup_steps: 10 must be at most train.max_steps = 9\n"


def test_show(capsys):
    code, out, _ = cli(capsys, "show", "jsonl", "--json")
    assert code == 0
    assert {(c["kind"], c["distribution"]) for c in json.loads(out)["components"]} == {
        ("trackers", "wmtp-core"),
        ("data_loaders", "wmtp-core"),
    }
    code, _, err = cli(capsys, "show", "plian")
    assert code == 2
    assert "error: no plugin provides 'plian'; did you mean 'plain'?" in err


def test_what_show_prints_is_toml_that_loads(capsys, folder):
    _, out, _ = cli(capsys, "show", "adamw")
    (folder / "o.toml").write_text(out[out.index("[optimizer]") :])
    assert wmtp.load_config(["a.toml", "o.toml"]).optimizer == wmtp.load_config("a.toml").optimizer


def test_version_and_help(capsys):
    assert cli(capsys, "--version")[:2] == (0, f"wmtp {wmtp.__version__}\n")
    code, out, _ = cli(capsys, "run", "--help")
    assert code == 0
    assert "--resume RUN_DIR|auto" in out


def launches(run_dir):
    return (Path(run_dir) / "launches").read_text().split()


def test_resume_by_directory_with_and_without_the_config(capsys, folder):
    run_json(capsys, "--run-name", "x", "--set", "launcher.do=stop")
    code, _, err = cli(capsys, "run", "--resume", "runs/x", "--set", "launcher.do=train")
    assert code == 0
    assert 'resumed with a change: launcher.do: "stop" → "train"' in err
    assert cli(capsys, "run", "a.toml", "--resume", "runs/x")[0] == 0
    assert launches("runs/x") == ["False", "True", "True"]
    facts = json.loads((folder / "runs/x/run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["resumed"][0]["changed"] == ['launcher.do: "stop" → "train"']
    assert wmtp.load_config("runs/x/config.toml").launcher.do == "train"


def test_resume_with_another_config_names_every_difference(capsys):
    run_json(capsys, "--run-name", "x")
    code, answer, _ = run_json(
        capsys, "--resume", "runs/x", "--set", "train.max_steps=10", "--set", "optimizer.lr=1", "--set", "run.seed=2"
    )
    assert code == 2
    changes = [line.rpartition("run's: ")[2] for line in answer["problems"] if "run's: " in line]
    assert changes == ["run.seed: 0 → 2", "optimizer.lr: 2e-05 → 1.0", "train.max_steps: 9 → 10"]
    assert "the learning rate of every step was planned" in "".join(answer["problems"])
    assert launches("runs/x") == ["False"]
    code, answer, _ = run_json(capsys, "--resume", "runs/x", "--set", "schedule.warmup_steps=2")
    assert "schedule.warmup_steps: not set → 2" in answer["problems"][0]


def test_a_resumed_run_keeps_its_name(capsys):
    run_json(capsys, "--run-name", "x")
    assert run_json(capsys, "--resume", "runs/x")[0] == 0
    assert wmtp.load_config("runs/x/config.toml").run.name == "x"
    code, answer, _ = run_json(capsys, "--resume", "runs/x", "--run-name", "y")
    assert (code, answer["error"]) == (2, "--run-name: a resumed run keeps its name; leave it out, or write --resume auto")


def test_resume_auto_with_a_name(capsys):
    assert run_json(capsys, "--run-name", "x", "--resume", "auto")[0] == 0
    assert run_json(capsys, "--run-name", "x", "--resume", "auto")[0] == 0
    assert launches("runs/x") == ["False", "True"]


def test_resume_auto_without_a_name(capsys):
    stop = ("--set", "launcher.do=stop", "--resume", "auto")
    code, answer, err = run_json(capsys, *stop)
    assert code == 1
    assert f"to resume: wmtp run --resume {answer['run_dir']}" in err
    first = answer["run_dir"]
    run_json(capsys, "--run-name", "named", "--set", "launcher.do=stop")
    assert run_json(capsys, *stop)[1]["run_dir"] == first
    assert run_json(capsys, *stop, "--set", "run.seed=7")[1]["run_dir"] != first  # another config is another run
    assert run_json(capsys, "--resume", "auto")[1]["run_dir"] == first
    assert run_json(capsys, "--resume", "auto")[1]["run_dir"] != first  # it is finished now
    assert launches(first) == ["False", "True", "True"]


@pytest.mark.parametrize(("path", "found"), [("runs/none", "does not exist"), ("site", "holds no run (no config.toml)")])
def test_resume_of_what_is_no_run(capsys, path, found):
    code, _, err = cli(capsys, "run", "--resume", path)
    assert (code, err) == (2, f"error: --resume {path}: {found}\n")


def test_two_processes_never_run_in_one_directory(capsys, folder):
    command = [sys.executable, "-m", "wmtp", "run", "a.toml", "--run-name", "x", "--set", "launcher.do=wait"]
    other = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (folder / "waiting").exists():
            assert other.poll() is None
            time.sleep(0.05)
        code, _, err = cli(capsys, "run", "a.toml", "--resume", "runs/x")
        assert code == 2
        assert f"another process is running there (process {other.pid} on " in err
    finally:
        other.kill()
        other.wait()
    assert cli(capsys, "run", "a.toml", "--resume", "runs/x")[0] == 0  # the lock died with its owner
    with open(folder / "runs/x/.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and is given back after a run


def test_secrets_never_reach_run_json(capsys, folder):
    code, _, err = run_json(capsys, "--set", "tracker.tracking_uri=https://me:hunter2@host")
    assert code == 2
    assert "hunter2" not in err
    code, answer, _ = run_json(capsys, "--run-name", "s", "--tags", "fine")
    facts = (Path(answer["run_dir"]) / "run.json").read_text()
    assert code == 0
    assert "hunter2" not in facts


def test_secrets_on_the_command_line_are_not_kept(capsys, monkeypatch):
    secrets = ["launcher.api_key=hunter2", "x=https://me:hunter2@host", "hf_abcdefghijklmnopqrstuvwxyz"]
    monkeypatch.setattr(sys, "argv", ["wmtp", *secrets, "--set", "train.max_steps=3"])
    _, answer, _ = run_json(capsys)
    facts = json.loads((Path(answer["run_dir"]) / "run.json").read_text())
    assert facts["argv"] == ["wmtp", "launcher.api_key=***", "x=***", "***", "--set", "train.max_steps=3"]


def test_a_directory_that_cannot_be_written(capsys, folder):
    (folder / "runs").write_text("a file")
    code, _, err = cli(capsys, "run", "a.toml")
    assert code == 2
    assert "run.output_dir: 'runs' is a file; write the path of a folder" in err


def test_python_does_the_same(folder):
    config = wmtp.load_config("a.toml")
    result = wmtp.run(config, overrides=["trainer.alpha=3"], run_name="py", tags=["t"])
    assert result.run_dir == folder / "runs" / "py"
    assert wmtp.load_config("runs/py/config.toml").trainer.alpha == 3
    with pytest.raises(wmtp.ConfigError, match="exists already"):
        wmtp.run(config, run_name="py")
    with pytest.raises(wmtp.ConfigError, match="no config: name a TOML file"):
        wmtp.run()
    with pytest.raises(ConfigError, match=r"overrides: a list of texts is wanted; write \['trainer.alpha=3'\]"):
        wmtp.run(config, overrides="trainer.alpha=3")
    assert set(wmtp.__all__) <= set(dir(wmtp))
    assert all(getattr(wmtp, name) is not None for name in wmtp.__all__ if name != "load_model")


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

"""Recipe, plugin and folder for tests of commands that run in this process."""

import json
import sys

import pytest

from wmtp.cli import main

__all__ = ["PLUGIN", "TOML", "cli", "folder", "run_json"]


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

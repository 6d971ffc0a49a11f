"""The command line and the run directory, with a real plugin whose launcher trains nothing."""

import json
import sys
from pathlib import Path

import pytest
from cli_recipe import cli, folder, run_json

import wmtp
from wmtp.errors import ConfigError

__all__ = ["folder"]


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

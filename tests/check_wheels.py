"""Builds the wheels, installs them in clean environments outside the workspace, and uses them there.

    uv run python tests/check_wheels.py [FOLDER]

It works in FOLDER, which must be new or empty, or in a temporary folder. Exits with 1 at the first thing that is wrong.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "wmtp-example"
PROJECTS = (*(ROOT / "packages" / f"wmtp-{name}" for name in ("core", "algos", "storage", "vessl")), EXAMPLE)
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
# what a user's shell does not have: the workspace's environment and path
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("VIRTUAL_ENV", "PYTHONPATH") and not name.startswith("WMTP_")
}


class Environment:
    """A clean virtual environment, and an empty folder to work in.

    Args:
        folder: where both are made.
        requirements: what to install: wheels, and names from the index.
    """

    def __init__(self, folder: Path, *requirements: str | Path) -> None:
        self.bin = folder / "venv" / "bin"
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        run("uv", "venv", "--quiet", "--no-project", "--python", sys.executable, folder / "venv", cwd=folder)
        self.install(*requirements)

    def install(self, *requirements: str | Path) -> None:
        """Install more: wheels, and names from the index."""
        install = ("uv", "pip", "install", "--quiet", "--no-config", "--exclude-newer", SETTINGS["exclude-newer"])
        run(*install, "--python", self.bin / "python", *requirements, cwd=self.work)

    def __call__(self, *command: str | Path, expect: int = 0) -> str:
        """Run an installed command in the empty folder, and return its standard output."""
        return run(self.bin / str(command[0]), *command[1:], cwd=self.work, expect=expect)


def run(*command: str | Path, cwd: Path, expect: int = 0) -> str:
    """Run a command; its standard error goes through, its standard output is returned."""
    words = [str(word) for word in command]
    print("$", shlex.join(words), flush=True)
    done = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    check(done.returncode == expect, f"exit code {done.returncode} in place of {expect}:\n{done.stdout}")
    return done.stdout


def check(condition: bool, message: str) -> None:
    """Stop here with ``message`` unless ``condition`` holds."""
    if not condition:
        sys.exit(f"check_wheels: {message}")


def build(wheels: Path) -> list[Path]:
    """Build the wheels of our packages and of wmtp-example, from their source distributions."""
    for project in PROJECTS:
        run("uv", "build", "--quiet", "--no-config", "--out-dir", wheels, project, cwd=wheels.parent)
    found = sorted(wheels.glob("*.whl"))
    check(
        [path.name.split("-")[0] for path in found]
        == ["wmtp_algos", "wmtp_core", "wmtp_example", "wmtp_storage", "wmtp_vessl"],
        f"built {found}",
    )
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            licences = [archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        expected = [] if "example" in wheel.name else [(ROOT / "LICENSE").read_bytes()]
        check(licences == expected, f"{wheel.name} has {len(licences)} licences")
    return found


def components(listing: str) -> dict[str, Any]:
    """``wmtp plugins --json`` as distribution → entry; every plugin must be sound."""
    entries = {entry["distribution"]: entry for entry in json.loads(listing)}
    broken = [entry for entry in entries.values() if entry["status"] != "ok"]
    check(not broken, f"broken plugins: {broken}")
    return entries


def check_training(wmtp: Environment) -> None:
    """Three wheels together: list, check, run, and the plugin's own tests."""
    (wmtp.work / "example.toml").write_text((EXAMPLE / "example.toml").read_text())
    listed = components(wmtp("wmtp", "plugins", "--json"))
    check(set(listed) == {"wmtp-core", "wmtp-algos", "wmtp-example"}, f"listed: {sorted(listed)}")
    example = listed["wmtp-example"]["components"]
    check(example == {"trainers": ["loss-ceiling", "loss-truncation"]}, f"listed: {example}")
    check("baseline-mtp" in listed["wmtp-algos"]["components"]["trainers"], f"listed: {listed['wmtp-algos']}")
    check("warmup_steps" in wmtp("wmtp", "show", "loss-truncation"), "wmtp show loss-truncation does not show its keys")
    wmtp("wmtp", "check", "example.toml")
    wmtp("wmtp", "check", "example.toml", "--set", "trainer.drap=0.1", expect=2)

    result = json.loads(wmtp("wmtp", "run", "example.toml", "--json"))
    check(result["steps"] == 20, f"result: {result}")
    run_dir = Path(result["run_dir"])
    check(run_dir.is_relative_to(wmtp.work), f"{run_dir} is not inside {wmtp.work}")
    check((run_dir / "metrics.jsonl").read_text().count("\n") >= 4, "metrics.jsonl is too short")
    check("truncation/threshold" in (run_dir / "metrics.jsonl").read_text(), "the plugin's metrics are missing")
    page = Path(wmtp("wmtp", "report", run_dir).strip())
    check("uPlot" in page.read_text() and "document_loss" in page.read_text(), f"{page} is not whole")
    load = (
        "import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]); "
        "print(type(m).__name__, 'wmtp' in sys.modules)"
    )
    check(wmtp("python", "-c", load, result["model"]).split() == ["LlamaForCausalLM", "False"], "the model does not open")
    shutil.copytree(EXAMPLE / "tests", wmtp.work / "tests")  # away from the workspace's settings
    check(" passed" in wmtp("python", "-m", "pytest", "-q", "tests"), "the example's tests do not pass")


def check_first_screen(wmtp: Environment) -> None:
    """Run README's first commands as a user of pip does, the training shortened."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    install, *commands = readme.partition("```sh\n")[2].partition("```")[0].splitlines()
    check(install == "pip install wmtp-core wmtp-algos" and len(commands) == 2, f"README begins with {install}, {commands}")
    for command in commands:
        words = shlex.split(command)
        wmtp(*words, *(["--set", "train.max_steps=20"] if "run" in words else []))
    (run_dir,) = (path.parent for path in wmtp.work.glob("runs/*/run.json"))
    check((run_dir / "model" / "mtp_heads.json").exists(), f"{run_dir} has no model")
    wmtp("wmtp", "init", "completion", "mine")
    check("ok" in wmtp("wmtp", "check", "mine/recipe.toml", "--set", "datasets.mine.uri=mine/train.jsonl"), "not ok")


def check_light(wmtp: Environment, example: Path) -> None:
    """wmtp-core alone: everything but training works without torch."""
    wmtp(
        "python", "-c", "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ('torch', 'transformers', 'mlflow'))))"
    )
    wmtp("wmtp", "--help")
    check(set(components(wmtp("wmtp", "plugins", "--json"))) == {"wmtp-core"}, "wmtp-core is not listed alone")
    (wmtp.work / "example.toml").write_text((EXAMPLE / "example.toml").read_text())
    wmtp("wmtp", "check", "example.toml", expect=2)  # no trainer is installed here
    wmtp("wmtp", "generate", ".", "--prompt", "a", expect=2)  # and no torch
    # without its dependencies: a plugin is listed and its config checked where torch is not
    run("uv", "pip", "install", "--quiet", "--no-config", "--no-deps", "--python", wmtp.bin / "python", example, cwd=wmtp.work)
    check(set(components(wmtp("wmtp", "plugins", "--json"))) == {"wmtp-core", "wmtp-example"}, "wmtp-example is not listed")
    wmtp("wmtp", "check", "example.toml")


def check_storage(wmtp: Environment) -> None:
    """wmtp-storage beside wmtp-core alone: its backends are found, and need no torch."""
    listed = components(wmtp("wmtp", "plugins", "--json"))
    check(listed["wmtp-storage"]["components"] == {"storages": ["s3", "gs", "az", "http"]}, f"listed: {listed}")
    check("acceleration" in wmtp("wmtp", "show", "s3"), "wmtp show s3 does not show its keys")


def check_vessl(wmtp: Environment) -> None:
    """wmtp-vessl on a laptop: a plan is printed without torch."""
    listed = components(wmtp("wmtp", "plugins", "--json"))
    check(listed["wmtp-vessl"]["components"] == {"launchers": ["vessl"]}, f"listed: {listed}")
    check("max_runtime" in wmtp("wmtp", "show", "vessl"), "wmtp show vessl does not show its keys")
    settings = 'type = "vessl"\ncluster = "c"\npreset = "p"\ngpus = 1\nimage = "i:1"\n'
    (wmtp.work / "vessl.toml").write_text(f"[launcher]\n{settings}")
    (wmtp.work / "example.toml").write_text((EXAMPLE / "example.toml").read_text())
    plan = wmtp("wmtp", "launch", "--on", "vessl", "--dry-run", "vessl.toml", "example.toml")
    check("command: exec wmtp start" in plan, f"planned: {plan}")


def main() -> None:
    """Build, install, use."""
    with tempfile.TemporaryDirectory(prefix="wmtp-wheels-") as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        wheels = folder / "wheels"
        wheels.mkdir(parents=True)
        algos, core, example, storage, vessl = build(wheels)
        check_light(Environment(folder / "light", core), example)
        check_storage(Environment(folder / "storage", core, storage))
        laptop = Environment(folder / "vessl", core, vessl)
        run(
            "uv",
            "pip",
            "install",
            "--quiet",
            "--no-config",
            "--no-deps",
            "--python",
            laptop.bin / "python",
            example,
            cwd=folder,
        )
        check_vessl(laptop)
        trains = Environment(folder / "trains", core, algos)
        check_first_screen(trains)
        trains.install(example, "pytest")
        check_training(trains)
    print("check_wheels: all is well")


if __name__ == "__main__":
    main()

"""Suite for launchers."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from attrs import frozen

from wmtp.config.load import load_config
from wmtp.config.schema import Config
from wmtp.config.tree import plain_value
from wmtp.errors import ConfigError
from wmtp.launchers import Launcher, LaunchPlan, RemoteLauncher, RunStatus
from wmtp.plugins.loader import load_plugins
from wmtp.testing.component import ComponentTests
from wmtp.trainers import Trainer

__all__ = ["LauncherTests"]

_SECRET = "s3cr3t-value-of-the-environment"
_PATIENCE = 30.0  # seconds in which a cancelled run ends


@frozen(kw_only=True)
class _Uniform(Trainer):
    """Trainer with uniform weights, where no plugin provides one."""

    type = "uniform"


class LauncherTests(ComponentTests):
    """Contract tests of a launcher.

    Of a remote launcher everything is tested that needs no service. With a fixture ``service`` that plays the service (and sets
    what the launcher needs to find it), a run is submitted, found, read and cancelled too.
    """

    __test__ = False
    kind = "launchers"

    @pytest.fixture
    def service(self) -> Any:
        """Play the service to launch on.

        A run that it starts stays alive until it is cancelled.
        """
        pytest.skip("no service to launch on")

    @pytest.fixture
    def run(self) -> Config:
        """A config to launch."""
        table = {
            "models": {"base": {"type": "scratch", "vocab_size": 258}},
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "python-source"}},
            "trainer": {"type": _Uniform.type},
            "launcher": {"type": type(self.config).type, **plain_value(self.config)},
        }
        return load_config(table, registry=self._registry())

    @pytest.fixture
    def launcher(self) -> RemoteLauncher:
        """Build the launcher, if it is a remote one."""
        built = self.config.build()
        if not isinstance(built, RemoteLauncher):
            pytest.skip("it runs things here")
        return built

    def test_build(self) -> None:
        """``build`` makes a launcher, and ``remote`` says of which sort."""
        built = self.config.build()
        assert isinstance(built, Launcher)
        assert isinstance(built, RemoteLauncher) == self.config.remote, "set remote = True in the config class"

    def test_planning_is_light(self, launcher: RemoteLauncher, run: Config, tmp_path: Path) -> None:
        """``wmtp launch --dry-run`` works where there is no torch."""
        if not self.registered:
            pytest.skip("registered = False")
        (tmp_path / "config.toml").write_text(tomli_w.dumps({"launcher": plain_value(self.config)}))
        module, name = type(self.config).__module__, type(self.config).__qualname__
        code = (
            f"import importlib, sys, tomllib; sys.path[:] = {sys.path!r}\n"
            "from wmtp.config.converter import make_converter\nfrom wmtp.plugins.loader import load_plugins\n"
            f"cls = getattr(importlib.import_module({module!r}), {name!r})\n"
            f"table = tomllib.load(open({str(tmp_path / 'config.toml')!r}, 'rb'))['launcher']\n"
            "make_converter(load_plugins()).structure(table, cls).build()\n"
            "print(*({'torch', 'transformers', 'mlflow'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == ""

    def test_a_plan_is_pure(self, launcher: RemoteLauncher, run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        """A plan depends on the config alone.

        Not on time, instance or network.
        """

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("plan() must not touch the network")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        first = launcher.plan(run)
        time.sleep(0.01)
        assert self.config.build().plan(run) == first
        assert isinstance(first, LaunchPlan)
        assert first.text.strip()
        assert re.fullmatch(r"[0-9a-f]{16,}", first.digest)
        other = load_config([run, {"run": {"seed": 4711}}], registry=self._registry())
        assert launcher.plan(other).digest != first.digest
        assert all("\n" not in warning for warning in first.warnings)

    def test_a_plan_holds_no_secret(self, launcher: RemoteLauncher, run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        """A plan contains nothing from the user's environment."""
        for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "VESSL_ACCESS_TOKEN"):
            monkeypatch.setenv(name, _SECRET)
        plan = self.config.build().plan(run)
        assert _SECRET not in f"{plan}"

    def test_the_checks_are_lines(self, launcher: RemoteLauncher, run: Config) -> None:
        """Every problem is ``dotted.key: what is wrong``; a sound config has none."""
        assert list(launcher.check(run)) == []

    def test_it_does_not_run_here(self, launcher: RemoteLauncher, run: Config, tmp_path: Path) -> None:
        """``wmtp run`` says what to do instead."""
        with pytest.raises(ConfigError, match="wmtp launch"):
            launcher.launch(run, tmp_path, resume=False)

    def test_a_run_from_submit_to_cancel(self, service: Any, launcher: RemoteLauncher, run: Config) -> None:
        """Submitted, found, alive, read, cancelled, over, found no more."""
        plan = launcher.plan(run)
        assert all(isinstance(remark, str) for remark in launcher.validate(run, plan))
        found = launcher.find(plan)
        assert not found
        name = launcher.submit(plan)
        assert isinstance(name, str)
        assert found is None or name in (launcher.find(plan) or ())
        status = launcher.status(name)
        assert isinstance(status, RunStatus)
        assert not status.state.is_over
        assert all(isinstance(line, str) and "\n" not in line for line in launcher.logs(name, tail=10, follow=False))
        assert all(isinstance(value, float) for value in launcher.metrics(name).values())
        launcher.cancel(name)
        deadline = time.monotonic() + _PATIENCE
        while not launcher.status(name).state.is_over and time.monotonic() < deadline:
            time.sleep(0.1)
        assert launcher.status(name).state.is_over
        assert not launcher.find(plan)
        list(launcher.logs(name, tail=None, follow=True))  # of a run that is over it ends

    def test_a_run_that_is_not_there(self, service: Any, launcher: RemoteLauncher) -> None:
        """An unknown run is named in the error."""
        with pytest.raises(ConfigError, match="no-such-run-4711"):
            launcher.status("no-such-run-4711")

    def _registry(self) -> Any:
        return load_plugins().with_classes([(self.kind, type(self.config)), ("trainers", _Uniform)])

"""Fixtures: the service on 127.0.0.1, the two files of a launch, the command line."""

import json

import pytest
from small_server import serving
from vessl_service import VESSLCTL, Api, Files, Handler

from wmtp.cli import main


@pytest.fixture
def api(monkeypatch, tmp_path):
    monkeypatch.setenv("VESSL_ACCESS_TOKEN", Api.token)
    monkeypatch.setenv("VESSL_DEFAULT_ORGANIZATION", "lab")
    monkeypatch.setenv("VESSL_DEFAULT_PROJECT", "mtp")
    with serving(Handler) as server:
        server.api = Api()
        monkeypatch.setenv("VESSL_API_HOST", f"http://127.0.0.1:{server.server_port}")
        yield server.api


@pytest.fixture
def vesslctl(tmp_path, monkeypatch):
    """The program vesslctl on PATH; the jobs that it has made."""
    program = tmp_path / "bin" / "vesslctl"
    program.parent.mkdir()
    program.write_text(VESSLCTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("STUB_STATE", str(tmp_path / "jobs.json"))
    return lambda: json.loads((tmp_path / "jobs.json").read_text())


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """No settings of the person who runs the tests, and no records."""
    for name in ("VESSL_ACCESS_TOKEN", "VESSL_DEFAULT_ORGANIZATION", "VESSL_DEFAULT_PROJECT", "VESSL_API_HOST",
                 "VESSL_CREDENTIALS_FILE", "VESSL_CONFIG_PATH", "XDG_STATE_HOME"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WMTP_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@pytest.fixture
def wmtp(capfd):
    """Runs a command in this process: exit code, standard output, standard error."""

    def run(*arguments):
        code = main([*map(str, arguments)])
        said = capfd.readouterr()
        return code, said.out, said.err

    return run

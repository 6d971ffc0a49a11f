"""VESSL's own client agrees: with our keys, and with what we send. Opt-in, because the package brings 77 others:

uv venv /tmp/vessl && uv pip install --python /tmp/vessl/bin/python vessl==0.1.199
WMTP_VESSL_CLIENT=/tmp/vessl/bin/python uv run pytest packages/wmtp-vessl/tests/test_real_client.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from vessl_service import LAUNCHER

from wmtp_vessl.render import KEYS

PYTHON = os.environ.get("WMTP_VESSL_CLIENT")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="WMTP_VESSL_CLIENT names no Python that has vessl==0.1.199")


def real(*arguments, **options):
    done = subprocess.run([PYTHON, *arguments], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_the_version_that_was_read():
    assert real("-c", "from importlib.metadata import version; print(version('vessl'))").strip() == "0.1.199"


def test_our_keys_are_those_of_its_model():
    code = (
        "import json\nfrom vessl.openapi_client.models import V1RunSpecFormBodyInput as Form\n"
        "print('KEYS', json.dumps(sorted(Form.attribute_map.values())))"
    )
    (line,) = [line for line in real("-c", code).splitlines() if line.startswith("KEYS ")]
    assert json.loads(line.removeprefix("KEYS ")) == sorted(KEYS)
    assert len(KEYS) == 14


@pytest.mark.parametrize("more", ["", 'spot = true\nmax_runtime = "24h"\nports = [{ name = "tb", port = 6006 }]'])
def test_it_sends_what_we_send(wmtp, files, api, tmp_path, more):
    """The plan as it is printed, saved to a file and given to ``vessl run create -f``, arrives byte for byte as ours."""
    files.write(LAUNCHER.replace("[launcher.env]", f"{more}\n[launcher.env]"))
    code, out, err = wmtp("launch", "--on", "vessl", "--dry-run", *files)
    assert code == 0, err
    plan = Path(tmp_path / "plan.yaml")
    plan.write_text(out)
    assert wmtp("launch", "--on", "vessl", *files)[0] == 0
    home = tmp_path / "client"
    (home / ".vessl").mkdir(parents=True)
    (home / ".vessl" / "config").write_text(
        f'[user]\naccess_token = "{api.token}"\ndefault_organization = "lab"\ndefault_project = "mtp"\n'
    )
    (home / ".vessl" / "tracing-agreement").write_text("")  # else it asks
    environment = {
        **os.environ, "HOME": str(home), "VESSL_DATA_COLLECTION_OPT_OUT": "true", "VESSL_LOG": "ERROR",
        "SENTRY_DSN": "",
    }  # fmt: skip
    said = real("-m", "vessl.cli._main", "run", "create", "-f", str(plan), env=environment)
    assert len(api.bodies) == 2, said
    ours, theirs = api.bodies
    assert theirs["yaml_spec"] == ours["yaml_spec"]
    assert set(yaml.safe_load(ours["yaml_spec"])) <= set(KEYS)

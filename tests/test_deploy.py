"""Examples for Slurm, SkyPilot and Kubernetes, by their own tools where these are installed."""

import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"


def test_the_script_for_slurm_is_bash():
    assert subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["skypilot", "kubernetes"])
def test_the_others_are_yaml_and_start_wmtp(name):
    assert "wmtp start" in str(yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())).replace("', '", " ")


def test_the_job_is_one_of_kubernetes():
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text()), "1.37", strict=True)

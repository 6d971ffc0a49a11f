"""Memory of two processes that load a model to shard it: none of them holds the whole of it in fp32."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LOAD = Path(__file__).parents[1] / "bench/load.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("what", "precision"), [("base", "bf16"), ("lora", "bf16-params")])
def test_no_process_holds_the_whole_model_in_fp32(what, precision, dtype, tmp_path_factory):
    """Each keeps its half, in fp32 where it learns and in bf16 where it does not; a layer and a table come on top."""
    if what == "lora":
        pytest.importorskip("peft")
    folder = tmp_path_factory.getbasetemp() / "models"
    given = ["--folder", folder, "--shape", "170m", "--dtype", dtype, "--horizon", "1", "--processes", "2"]
    given += ["--what", what, "--precision", precision, "--device", "cpu"]
    done = subprocess.run([sys.executable, LOAD, *map(str, given)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2
    table = 4 * 32_000 * 1024 / 2**20
    whole = 4 * 170e6 / 2**20
    kept = whole / 2 if what == "base" else whole / 4
    for line in lines:
        assert line["RssAnon"] < kept + 2 * table + 60, lines

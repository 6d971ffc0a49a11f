"""Commands of wmtp-core alone, which has no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = "import sys; sys.modules['torch'] = None; from wmtp.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize(
    "command",
    [
        ["generate", ".", "--prompt", "a"],
        ["export", ".", "out", "--format", "hf"],
        ["distill-data", ".", "p.jsonl", "--output", "a.jsonl"],
    ],
)
def test_a_command_that_needs_torch_says_what_to_install(command: list[str], tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT, *command], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr == "error: torch is not installed, which this needs: pip install 'wmtp-core[train]'\n"

"""Count the files of WMTP that one optimizer step enters.

``python tests/step_files.py`` prints them for ``baseline-mtp`` with one micro-batch and for ``rho1-wmtp`` with two, on the CPU.
Nothing is logged or recorded in the steps that are counted. The thread that makes batches ahead is counted too.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import wmtp
from wmtp.config.load import load_config

_PACKAGES = (str(Path(wmtp.__file__).parent), "/wmtp_algos/")
_SIZES = {"vocab_size": 258, "hidden_size": 16, "layers": 1, "attention_heads": 2, "intermediate_size": 16, "max_positions": 32}
#: steps of the run, and those that are counted: in one step alone, the thread of the batches might have nothing to do
_STEPS, _COUNTED = 12, range(4, 8)


def make_config(folder: Path, trainer: dict[str, Any], *, micro_batches: int) -> wmtp.Config:
    """Make a run of some steps on a tiny model, that logs its last step only."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}", "completion": f" is {i % 3}"}) + "\n" for i in range(64)))
    return load_config(
        {
            "run": {"output_dir": str(folder / "runs")},
            "models": {name: {"type": "scratch", **_SIZES} for name in ("base", "ref")} if "rho1" in trainer["type"] else {
                "base": {"type": "scratch", **_SIZES}
            },
            "tokenizer": {"type": "bytes"},
            "datasets": {"numbers": {"type": "jsonl", "uri": str(data)}},
            "data": {"train": {"max_length": 16, "batch_size": 4, "micro_batch_size": 4 // micro_batches, "packing": False}},
            "trainer": trainer,
            "devices": {"device": "cpu"},
            "train": {"max_steps": _STEPS, "log_interval": _STEPS},
            "checkpoints": {"save_final": False},
            "report": {"samples": 0, "weight_interval": 0},
            "tracker": {"type": "jsonl"},
        }
    )  # fmt: skip


def step_files(config: wmtp.Config) -> dict[str, set[str]]:
    """Run a config, and find the functions that an optimizer step enters, by file."""
    step = 0
    found: dict[str, set[str]] = {}

    def enter(frame: FrameType, event: str, _: object) -> None:
        nonlocal step
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGES[0]) or _PACKAGES[1] in code.co_filename:
            step += code.co_qualname == "Fit._optimizer_step"
            if step in _COUNTED:
                found.setdefault(code.co_filename.rpartition("/src/")[2], set()).add(code.co_qualname)

    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        wmtp.run(config, run_name="counted")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return found


def main() -> None:
    """Print the files of both kinds of step."""
    for trainer, micro_batches in (({"type": "baseline-mtp"}, 1), ({"type": "rho1-wmtp"}, 2)):
        with tempfile.TemporaryDirectory() as folder:
            found = step_files(make_config(Path(folder), trainer, micro_batches=micro_batches))
        functions = sum(map(len, found.values()))
        print(f"{trainer['type']}, {micro_batches} micro-batches: {len(found)} files, {functions} functions")
        for name in sorted(found):
            print(f"  {name}: {', '.join(sorted(found[name]))}")


if __name__ == "__main__":
    main()

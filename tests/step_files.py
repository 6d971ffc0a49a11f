"""Count the files of WMTP that one optimizer step enters.

``python tests/step_files.py`` prints them for ``baseline-mtp`` with one micro-batch and for ``rho1-wmtp`` with two, on the CPU.
The step is logged, as every step is by default; it records no texts and no distribution of weights. Batches are made ahead in a
thread of their own: files that only that thread enters are listed apart.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from attrs import Factory, frozen
from tiny_recipe import TINY_MODEL

import wmtp
from wmtp.config.load import load_config

#: steps of the run, and those that are counted: in one step alone, the thread of the batches might have nothing to do
_STEPS, _COUNTED = 12, range(4, 8)


@frozen
class Entered:
    """Functions that optimizer steps enter, by file.

    Args:
        step: by the thread that trains.
        batches: by the thread that makes batches ahead.
    """

    step: dict[str, set[str]] = Factory(dict)
    batches: dict[str, set[str]] = Factory(dict)


def count(trainer: dict[str, Any], folder: Path, *, micro_batches: int, models: tuple[str, ...] = ("base",)) -> Entered:
    """Run some steps of a tiny model, and find what they enter.

    Args:
        trainer: the table ``[trainer]``.
        folder: for data and run.
        micro_batches: of each step.
        models: the tables ``[models.*]``.
    """
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}", "completion": f" is {i % 3}"}) + "\n" for i in range(64)))
    config = load_config(
        {
            "run": {"output_dir": str(folder / "runs")},
            "models": dict.fromkeys(models, TINY_MODEL),
            "tokenizer": {"type": "bytes"},
            "datasets": {"numbers": {"type": "jsonl", "uri": str(data)}},
            "data": {"train": {"max_length": 16, "batch_size": 4, "micro_batch_size": 4 // micro_batches, "packing": False}},
            "trainer": trainer,
            "devices": {"device": "cpu"},
            "train": {"max_steps": _STEPS, "accuracy_interval": 0},
            "checkpoints": {"save_final": False},
            "report": {"samples": 0, "weight_interval": 0},
            "tracker": {"type": "jsonl"},
        }
    )
    step, found = 0, Entered()

    def enter(frame: FrameType, event: str, _: object) -> None:
        nonlocal step
        package, _, name = frame.f_code.co_filename.rpartition("/src/")
        if event != "call" or not package or not name.startswith(("wmtp/", "wmtp_algos/")):
            return
        step += frame.f_code.co_qualname == "Fit._optimizer_step"
        if step in _COUNTED:
            files = found.step if threading.current_thread() is threading.main_thread() else found.batches
            files.setdefault(name, set()).add(frame.f_code.co_qualname)

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
    for kind, micro_batches, models in (("baseline-mtp", 1, ("base",)), ("rho1-wmtp", 2, ("base", "ref"))):
        with tempfile.TemporaryDirectory() as folder:
            found = count({"type": kind}, Path(folder), micro_batches=micro_batches, models=models)
        functions = sum(map(len, found.step.values()))
        print(f"{kind}, micro-batches: {micro_batches}, files: {len(found.step)}, functions: {functions}")
        for name in sorted(found.step):
            print(f"  {name}: {', '.join(sorted(found.step[name]))}")
        print(f"  beside it, batches: {', '.join(sorted(found.batches.keys() - found.step.keys()))}")


if __name__ == "__main__":
    main()

"""Every causal architecture of transformers, tiny: opened, trained, saved and decoded.

    python bench/architectures/walk_architectures.py docs/architectures.json            # all: a quarter of an hour on one core
    python bench/architectures/walk_architectures.py /tmp/some.json llama qwen3_next    # some; the file keeps the others

One worker process does one type after another, so that torch and transformers are imported once. A type that takes too long
or takes the process down costs that process alone.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

#: seconds for one architecture
LIMIT = 120
#: what is tried of each, in this order; what comes after a failed ``open`` is not
STEPS = ("open", "padded", "packed", "save", "decode", "speculate")


def examine(model_type: str, folder: Path, steps: tuple[str, ...] = STEPS) -> dict[str, str]:
    """Try everything on one architecture.

    Args:
        model_type: transformers' name of it.
        folder: empty, for its files.
        steps: which of `STEPS`.

    Returns:
        for each step ``ok``, ``refused: why``, ``crash: what`` or ``wrong: what``.
    """
    import architecture_checks as checks
    import torch
    from tiny_config import tiny_config
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from wmtp.errors import WMTPError
    from wmtp.models.mtp import MTPModel

    found: dict[str, str] = {}

    def attempt(step: str, work: Callable[[], Any]) -> Any:
        try:
            result = work()
        except WMTPError as error:
            found[step] = f"refused: {error}"
        except AssertionError as error:
            found[step] = f"wrong: {error}"
        except Exception as error:  # a crash is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            found[step] = f"crash: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"[:600]
        else:
            found[step] = "ok"
            return result
        return None

    try:
        config = tiny_config(model_type)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            base: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
            checks.enlarge(base)
        base.save_pretrained(folder / "base")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        return {"make": f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"}
    model: MTPModel | None = attempt("open", lambda: checks.opened(folder / "base"))
    if model is None:
        return found
    work: dict[str, Callable[[], Any]] = {
        "padded": lambda: checks.trains_padded(model),
        "packed": lambda: checks.trains_packed(model),
        "save": lambda: checks.reopens(model, folder / "saved"),
        "decode": lambda: checks.decodes(model, speculative=False),
        "speculate": lambda: checks.decodes(model, speculative=True),
    }
    for step in steps:
        if step in work:
            attempt(step, work[step])
    return found


def _work() -> None:
    """Answer model types on standard input by findings, one a line."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="architecture-") as folder:
            found = examine(line.strip(), Path(folder))
        answers.write(json.dumps(found) + "\n")
        answers.flush()


class _Worker:
    """Process that examines, started again when it was lost."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, model_type: str) -> dict[str, str]:
        """Examine one architecture.

        A lost process and one that takes too long are findings too.
        """
        if self._process is None:
            command = ["nice", "-n", "10", sys.executable, "-W", "ignore", __file__, "--worker"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        process = self._process
        words, answers = process.stdin, process.stdout
        assert words is not None
        assert answers is not None
        words.write(model_type + "\n")
        words.flush()
        if line := _line_in_time(answers):
            return json.loads(line)
        lost = process.poll() is not None
        self.stop()
        return {"open": "crash: the process died" if lost else f"crash: not done after {LIMIT} seconds"}

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


def _line_in_time(answers: IO[str]) -> str:
    ready, _, _ = select.select([answers], [], [], LIMIT)
    return answers.readline() if ready else ""


def main() -> None:
    """Examine architectures and store what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work()
    if options.out is None:
        parser.error("OUT.json is needed")

    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stored: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"types": {}}
    worker = _Worker()
    try:
        for model_type in options.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            start = time.perf_counter()
            found = worker.ask(model_type)
            stored["transformers"] = transformers.__version__
            stored["types"][model_type] = found
            short = " ".join(f"{step}={text.split(':')[0]}" for step, text in found.items())
            print(f"{model_type:28} {time.perf_counter() - start:5.1f} s  {short}", flush=True)
            stored["types"] = dict(sorted(stored["types"].items()))
            options.out.write_text(json.dumps(stored, indent=1) + "\n")
    finally:
        worker.stop()


if __name__ == "__main__":
    main()

"""Worker process of a study: ``python -m wmtp.actions.study_worker``.

It trains one run after another, as it is told. A job is a line of JSON on standard input, an answer one on standard output.
What a run prints goes into a log file of its own. The end of standard input is the end of the study's own process: a run that
is being trained then saves a checkpoint.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import IO, Any

import tomli

from wmtp.errors import ConfigError, WMTPError, described

__all__ = ["main"]


def main() -> int:
    """Train jobs until there are no more, or one fails."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a study in a script's background inherits that it is ignored
    answers = os.fdopen(os.dup(1), "w")
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    state = {"trains": False}
    threading.Thread(target=_listen, args=(os.fdopen(os.dup(0)), jobs, state), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nothing that a run starts may take a job away
    threads: int | None = None
    while line := _next(jobs):
        job = json.loads(line)
        state["trains"] = True
        answer = _train(job, threads)
        state["trains"] = False
        threads = answer.pop("threads", threads)
        print(json.dumps(answer), file=answers, flush=True)
        if answer["status"] not in ("finished", "stopped"):
            return 0  # what an error leaves behind is no place for the next run
    return 0


def _next(jobs: queue.SimpleQueue[str]) -> str:
    """Wait for a job; Ctrl-C between two runs ends without error."""
    try:
        return jobs.get()
    except KeyboardInterrupt:
        return ""


def _listen(jobs_in: IO[str], jobs: queue.SimpleQueue[str], state: dict[str, bool]) -> None:
    for line in jobs_in:
        jobs.put(line)
    if state["trains"]:
        os.kill(os.getpid(), signal.SIGTERM)
    jobs.put("")


def _train(job: dict[str, Any], threads: int | None) -> dict[str, Any]:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    sys.argv = job["argv"]
    try:
        import torch

        from wmtp.api import run

        if threads is None:
            threads = torch.get_num_threads()
        torch.set_num_threads(threads)  # the run before may have chosen another number
        config = tomli.loads(Path(job["config"]).read_text(encoding="utf-8"))
        result = run(config, resume="auto", allow_code_execution=job["allow_code_execution"])
        answer = {"status": result.status, "error": None}
        del result
        _clear(compiled=bool(config.get("devices", {}).get("compile")))
    except KeyboardInterrupt as error:  # which may have come when the run was done
        answer = {"status": getattr(getattr(error, "result", None), "status", "interrupted"), "error": None}
    except ConfigError as error:
        answer = {"status": "failed", "error": "; ".join(error.problems)}
    except WMTPError as error:
        if not isinstance(error.__cause__, WMTPError | None):  # of a plugin, say: the log has all of it
            traceback.print_exc()
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        answer = {"status": "failed", "error": "; ".join(lines)}
    except BaseException as error:
        traceback.print_exc()
        answer = {"status": "failed", "error": described(error)}
    sys.stdout.flush()
    sys.stderr.flush()
    return {**answer, "threads": threads}


def _clear(*, compiled: bool) -> None:
    """Free memory and compiled layers before the next run.

    torch keeps only so many compiled layers.
    """
    import torch

    gc.collect()
    if compiled and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    raise SystemExit(main())

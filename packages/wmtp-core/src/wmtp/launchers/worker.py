"""One process of a run: ``python -m wmtp.launchers.worker FOLDER``.

`wmtp.launchers.torchrun` starts it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Final

from wmtp.config.load import load
from wmtp.distributed.environment import Worker
from wmtp.errors import ConfigError, PluginError, WMTPError, described
from wmtp.launchers.torchrun import write_failure, write_result
from wmtp.log_lines import set_up_logging
from wmtp.plugins.failures import plugin_failure

__all__ = ["main"]

logger = logging.getLogger("wmtp")

#: seconds between two looks at the launcher
_PAUSE: Final = 0.5


def main(folder: str) -> int:
    """Train as rank ``RANK``; what went wrong is left for the launcher."""
    job = Path(folder)
    facts = json.loads((job / "job.json").read_text())
    _end_with(facts["parent"])  # before the imports that take seconds: without it the others are waited for in vain

    from wmtp.distributed.monitor import LostRankError
    from wmtp.distributed.start import joined
    from wmtp.training.run import train

    worker = Worker.of()
    if worker is None:
        raise WMTPError("wmtp.launchers.worker is started by wmtp run, with RANK, WORLD_SIZE and LOCAL_RANK set; use wmtp run")
    set_up_logging(verbose=facts["verbose"], rank=worker.rank)
    try:
        config = load(job / "config.toml").config
        report = lambda line: write_failure(job, worker.rank, "lost", [line])  # noqa: E731
        with joined(config, worker, report=report) as ranks:
            place = ranks.main_only(lambda: (facts["run_dir"], facts["resume"]))
            result = train(config, Path(place[0]), resume=place[1], ranks=ranks)
            if worker.local_rank == 0:
                write_result(job, result)
        return 0
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # others are ended now, and this one has something to say
        if isinstance(error, KeyboardInterrupt):
            if (result := getattr(error, "result", None)) is not None:  # of rank 0: what was saved before
                write_result(job, result)
            return 1
        if (failure := plugin_failure(error)) is not None:
            if facts["verbose"]:  # else its line in the plugin is all that is said
                traceback.print_exc()
            error = failure
        kind, lines = _described(error)
        if isinstance(error, LostRankError):
            kind = "lost"
        if kind == "bug":
            traceback.print_exc()
            kind = "work"
        write_failure(job, worker.rank, kind, lines)  # also what rank 0 says: it may be ended before
        sys.stderr.flush()
        os._exit(1)  # a collective that waits for a lost rank must not keep this one


def _end_with(parent: int) -> None:
    """Ask this process to end once its launcher is gone.

    By SIGTERM, as the launcher does: at once before a run catches it, and then with a checkpoint.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PAUSE)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="wmtp-launcher", daemon=True).start()


def _described(error: BaseException) -> tuple[str, list[str]]:
    if isinstance(error, ConfigError):
        return "config", list(error.problems)
    if isinstance(error, WMTPError):
        return "plugin" if isinstance(error, PluginError) else "work", str(error).splitlines()
    return "bug", [described(error)]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))

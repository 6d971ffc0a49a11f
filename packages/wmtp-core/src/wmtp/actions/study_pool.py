"""Worker processes that train a study's runs, several at once.

Each trains one run at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from attrs import frozen

from wmtp.cores import usable_cores
from wmtp.studies.plan import PlannedRun

__all__ = ["Outcome", "Pool", "worker_environments"]

_WORKER: Final = ("-m", "wmtp.actions.study_worker")


@frozen(kw_only=True)
class Outcome:
    """End of a run in its process.

    Args:
        run: which.
        status: ``finished``, ``stopped``, ``interrupted`` or ``failed``; ``skipped`` where a run that it needs failed.
        error: why it failed or was skipped.
        seconds: in this session.
    """

    run: PlannedRun
    status: str
    error: str | None
    seconds: float

    @property
    def is_good(self) -> bool:
        """True for a run that came to its end."""
        return self.status in ("finished", "stopped")


class Pool:
    """Trains runs in worker processes, those that others need first.

    Args:
        runs: to be trained, each after those of them that it needs.
        failed: why others failed before, by name: what needs one of them is skipped.
        job: makes the message for a worker.
        environments: of the worker processes, one for each.
        done: is told how each run ended, by one thread at a time; false: begin no further run.
        may_begin: is asked before a run begins; false: it is left, and so are those that need it.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        *,
        failed: Mapping[str, str],
        job: Callable[[PlannedRun], Mapping[str, Any]],
        environments: Sequence[Mapping[str, str]],
        done: Callable[[Outcome], bool],
        may_begin: Callable[[PlannedRun], bool],
    ) -> None:
        self._waiting = list(runs)
        self._job, self._environments, self._done, self._may_begin = job, environments, done, may_begin
        self._changed = threading.Condition()
        self._running: dict[str, PlannedRun] = {}
        self._bad = dict(failed)
        self._left: set[str] = set()
        self._workers: set[subprocess.Popen[str]] = set()
        self._stops = False
        self._error: BaseException | None = None

    def run(self) -> None:
        """Train all.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM, when every process has saved a checkpoint; at once the second time.
        """
        threads = [threading.Thread(target=self._serve, args=(env,), daemon=True) for env in self._environments]
        for thread in threads:
            thread.start()
        interrupt: BaseException | None = None
        while any(thread.is_alive() for thread in threads):
            try:
                with self._changed:
                    self._changed.wait(0.2)
            except KeyboardInterrupt as error:
                self._stop(signal.SIGKILL if interrupt is not None else signal.SIGINT)
                interrupt = error
        if interrupt is not None:
            raise interrupt
        if self._error is not None:
            raise self._error

    def _stop(self, number: int) -> None:
        with self._changed:
            self._stops = True
            workers = list(self._workers)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    def _serve(self, environment: Mapping[str, str]) -> None:
        """Keep one worker busy; replace it after a run that failed."""
        worker: subprocess.Popen[str] | None = None
        try:
            while (run := self._take()) is not None:
                if worker is None:
                    worker = self._start(environment)
                began = time.monotonic()
                answer = self._ask(worker, run)
                outcome = Outcome(run=run, status=answer["status"], error=answer["error"], seconds=time.monotonic() - began)
                if not outcome.is_good:
                    self._end(worker)
                    worker = None
                self._report(outcome)
        except BaseException as error:
            with self._changed:
                self._stops, self._error = True, self._error or error
        finally:
            if worker is not None:
                self._end(worker)
            with self._changed:
                self._changed.notify_all()

    def _take(self) -> PlannedRun | None:
        """Wait for a run that can begin; None when none is left."""
        with self._changed:
            while True:
                if self._stops or not self._waiting:
                    return None
                unmade = {run.name for run in self._waiting} | self._running.keys()
                for run in list(self._waiting):
                    if (broken := next((name for name in run.needs if name in self._bad), None)) is not None:
                        self._waiting.remove(run)
                        self._bad[run.name] = f"it needs {broken}, which failed"
                        self._tell(Outcome(run=run, status="skipped", error=self._bad[run.name], seconds=0.0))
                    elif self._left.intersection(run.needs):
                        self._leave(run)
                    elif not unmade.intersection(run.needs):
                        if not self._may_begin(run):
                            self._leave(run)
                            continue
                        self._waiting.remove(run)
                        self._running[run.name] = run
                        return run
                if self._waiting:
                    self._changed.wait()

    def _leave(self, run: PlannedRun) -> None:
        """Leave a run for another call; others may still begin."""
        self._waiting.remove(run)
        self._left.add(run.name)

    def _report(self, outcome: Outcome) -> None:
        with self._changed:
            del self._running[outcome.run.name]
            if outcome.status == "failed":
                self._bad[outcome.run.name] = outcome.error or "failed"
            elif outcome.status == "interrupted":
                self._stops = True
            self._tell(outcome)
            self._changed.notify_all()

    def _tell(self, outcome: Outcome) -> None:
        if not self._done(outcome):
            self._stops = True

    def _start(self, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, *_WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on once
        )
        with self._changed:
            self._workers.add(worker)
        return worker

    def _ask(self, worker: subprocess.Popen[str], run: PlannedRun) -> dict[str, Any]:
        assert worker.stdin is not None, "it was started with pipes"
        assert worker.stdout is not None, "it was started with pipes"
        try:
            worker.stdin.write(json.dumps(self._job(run)) + "\n")
            worker.stdin.flush()
            if line := worker.stdout.readline():
                return json.loads(line)
        except (BrokenPipeError, ValueError):
            pass
        code = worker.wait()
        if self._stops and code <= 0:  # Ctrl-C came before the worker had begun with the run
            return {"status": "interrupted", "error": None}
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            reason += ", as the system does where memory runs out"
        return {"status": "failed", "error": f"its process ended by {reason}"}

    def _end(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None, "it was started with pipes"
        assert worker.stdout is not None, "it was started with pipes"
        with contextlib.suppress(OSError):
            worker.stdin.close()
        worker.wait()
        worker.stdout.close()
        with self._changed:
            self._workers.discard(worker)


def worker_environments(jobs: int) -> list[dict[str, str]]:
    """Give each process a GPU, or its share of the cores."""
    if jobs == 1:
        return [{}]
    from wmtp.devices import count_devices, pick_device

    devices = count_devices(pick_device("auto"))
    cores = max(1, usable_cores() // jobs)
    if not devices:
        return [{} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(cores)} for _ in range(jobs)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) == devices and all(visible) else [str(number) for number in range(devices)]
    return [{"CUDA_VISIBLE_DEVICES": names[slot % devices]} for slot in range(jobs)]

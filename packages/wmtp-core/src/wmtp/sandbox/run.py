"""Starts sandboxes, watches them, and ends them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from attrs import evolve, frozen

from wmtp.errors import WMTPError
from wmtp.sandbox.cgroup import Cgroup, find_parent

__all__ = ["Isolation", "Limits", "Outcome", "Sandbox"]

_CHILD: Final = Path(__file__).with_name("child.py")
_PYTHON: Final = f"python{sys.version_info[0]}.{sys.version_info[1]}"
_MESSAGE: Final = 16 * 2**20  # bytes of one argument list or result
#: all that a sandbox sees of the machine, besides its Python
_VISIBLE: Final = ("/usr", "/lib", "/lib64", "/bin", "/dev/null", "/dev/zero", "/dev/urandom")
_GUARD_SECONDS: Final = 10.0
#: a busy machine is slow to make its first sandbox, which says nothing of whether it can
_TRIAL_SECONDS: Final = 60.0
_UIDS: Final = itertools.count(os.getpid() % 10_000)

Isolation = Literal["namespaces", "process"]


@frozen(kw_only=True)
class Limits:
    """Resource limits of one solution.

    Args:
        seconds: of wall-clock time, and of CPU time of each process.
        memory_mb: address space of each process; all together have at most ``processes`` times as much, and ``disk_mb``.
        processes: processes and threads.
        disk_mb: of its temporary folder, which lies in memory.
        output_kb: of standard output that is read; more ends it.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    processes: int = 8
    disk_mb: int = 32
    output_kb: int = 4096


@frozen(kw_only=True)
class Outcome:
    """Result of running a solution.

    Args:
        passed: whether all tests passed.
        detail: ``passed``, ``timed out``, or ``failed: …``.
    """

    passed: bool
    detail: str


class Sandbox:
    """Runs solutions, each in a sandbox of its own.

    A solution never decides about itself. Where tests are Python code, they run in a second sandbox, in which the solution's
    functions are calls over a pipe that carries plain data only: whatever the solution does to its own process (a patched
    ``builtins``, ``os._exit(0)``, a forged report) does not reach the tests. Where tests are input and output, they are
    compared out here.

    Args:
        limits: of one solution.
        isolation: ``auto`` wants Linux namespaces: own users, mounts, network, processes and IPC. ``process`` does without:
            limits, an empty environment and a temporary folder, but the solution can read what you can read, use the network
            and kill your processes.

    Raises:
        WMTPError: ``auto``, and this machine cannot make the namespaces.
    """

    def __init__(self, limits: Limits | None = None, *, isolation: Literal["auto", "process"] = "auto") -> None:
        self.limits = limits or Limits()
        self.isolation: Isolation = "process" if isolation == "process" else "namespaces"
        self._groups: Path | None = None
        if self.isolation == "namespaces":
            self._groups = find_parent(self._group_limits())
            given, self.limits = self.limits, evolve(self.limits, seconds=max(self.limits.seconds, _TRIAL_SECONDS))
            trial = self.run_program("print(6 * 7)", "", "42")
            self.limits = given
            if not trial.passed:
                raise WMTPError(
                    f"this machine cannot isolate code that a model wrote ({trial.detail}): Linux with namespaces is needed, "
                    'as root or with unprivileged user namespaces. isolation = "process" runs it with limits only: do that on '
                    "a machine where nothing is worth protecting"
                )

    def describe(self) -> str:
        """Describe the isolation in force, in one sentence."""
        limits = self.limits
        numbers = (
            f"{limits.seconds:g} s, {limits.memory_mb} MB a process, {limits.processes} processes, {limits.output_kb} KB output"
        )
        if self.isolation == "namespaces":
            return (
                f"namespaces: own user, mounts, network (none), processes and IPC; only Python and a folder in memory "
                f"({limits.disk_mb} MB) can be seen; {numbers}; {self._describe_group()}"
            )
        return f"process: limits only ({numbers}); files, network and processes of this user are NOT out of reach"

    def _describe_group(self) -> str:
        if self._groups is None:
            return "no cgroup: the memory of all processes is bounded by their number only"
        return f"cgroup: {self._group_limits()['memory.max'] // 2**20} MB of memory of all kinds together"

    def _group_limits(self) -> dict[str, int]:
        limits = self.limits
        memory = (limits.processes * limits.memory_mb + limits.disk_mb) * 2**20
        # beside those of the solution the guard and the first process
        return {"memory.max": memory, "memory.swap.max": 0, "memory.oom.group": 1, "pids.max": limits.processes + 2}

    def run_tests(self, code: str, tests: str, *, names: Sequence[str], setup: str = "") -> Outcome:
        """Run Python tests against a solution.

        Args:
            code: the solution, of a model.
            tests: run in the other sandbox; any exception is a failure.
            names: of the solution's functions and classes that the tests use.
            setup: run before the tests, for names that are not the solution's.
        """
        with contextlib.ExitStack() as stack:
            to_solution, to_judge, report = (_Pipe(stack) for _ in range(3))
            common = {"message": _MESSAGE}
            solving = {"mode": "serve", "code": code, **common}
            self._start(stack, solving, pipes=(to_solution.reading, to_judge.writing))
            judging = {"mode": "judge", "code": tests, "names": list(names), "setup": setup, **common}
            self._start(stack, judging, pipes=(to_judge.reading, to_solution.writing, report.writing))
            to_solution.close()
            to_judge.close()
            report.close(report.writing)
            text, _ = _read(report.reading, time.monotonic() + self.limits.seconds, 4096)
        if text is None:
            return Outcome(passed=False, detail="timed out")
        try:
            verdict = json.loads(text)
        except ValueError:
            return Outcome(passed=False, detail="failed: the tests ended without a verdict")
        return Outcome(passed=verdict == "passed", detail=str(verdict))

    def run_program(self, code: str, given: str, expected: str) -> Outcome:
        """Run a whole program, and compare its output word by word."""
        with contextlib.ExitStack() as stack:
            output = _Pipe(stack)
            source = stack.enter_context(tempfile.TemporaryFile())
            source.write(given.encode())
            source.seek(0)
            problems = stack.enter_context(tempfile.TemporaryFile())
            process = self._start(
                stack, {"mode": "program", "code": code}, stdin=source, stdout=output.writing, stderr=problems
            )
            output.close(output.writing)
            deadline = time.monotonic() + self.limits.seconds
            text, whole = _read(output.reading, deadline, self.limits.output_kb * 1024)
            if text is None:
                return Outcome(passed=False, detail="timed out")
            if not whole:
                return Outcome(passed=False, detail="failed: more output than allowed")
            try:
                status = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return Outcome(passed=False, detail="timed out")
            problems.seek(max(0, problems.seek(0, 2) - 500))
            said = problems.read().decode(errors="replace").strip().splitlines()
        if status != 0:
            return Outcome(passed=False, detail=f"failed: {said[-1] if said else f'exit code {status}'}")
        if text.decode(errors="replace").split() != expected.split():
            return Outcome(passed=False, detail="failed: another output")
        return Outcome(passed=True, detail="passed")

    def _start(
        self,
        stack: contextlib.ExitStack,
        request: dict[str, Any],
        *,
        pipes: Sequence[int] = (),
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = subprocess.DEVNULL,
        stderr: Any = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a sandbox, which ends when ``stack`` is left.

        Everything in it ends with it.
        """
        folder = tempfile.mkdtemp(prefix="wmtp-sandbox-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        limits, python = self.limits, Path(sys.base_prefix)
        visible = [place for place in _VISIBLE if os.path.lexists(place)]
        if not python.is_relative_to("/usr"):
            visible.append(str(python))
        if self._groups is not None:
            group = Cgroup(self._groups, self._group_limits())
            stack.callback(group.end)
            request["cgroup"] = str(group.folder)
        request |= {
            "isolate": self.isolation == "namespaces",
            "root": folder,
            "disk": limits.disk_mb * 2**20,
            "visible": visible,
            "uid": 3_000_000 + next(_UIDS) % 100_000,
            "pipes": list(pipes[:2]),
            "verdict": pipes[2] if len(pipes) > 2 else None,
            "limits": {
                "CPU": int(limits.seconds) + 1,
                "AS": limits.memory_mb * 2**20,
                "FSIZE": limits.disk_mb * 2**20,
                "NOFILE": 64,
                "CORE": 0,
                "MEMLOCK": 0,  # of memfd_secret too, which counts as locked
                "SIGPENDING": 256,  # queued signals and timers, of which a user has some ten thousand
                # without an own user the kernel counts all processes of this one
                **({"NPROC": limits.processes} if self.isolation == "namespaces" else {}),
            },
        }
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                [
                    str(python / "bin" / _PYTHON),
                    "-I",
                    "-S",
                    "-B",
                    str(_CHILD),
                    str(reading),
                ],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                cwd=folder,
                pass_fds=(reading, *pipes),
                start_new_session=True,
            )
        finally:
            os.close(reading)
        lifeline = os.fdopen(writing, "wb")
        stack.callback(_end, process, lifeline, guarded=self.isolation == "namespaces")
        with contextlib.suppress(BrokenPipeError):
            lifeline.write(json.dumps(request).encode() + b"\n")
            lifeline.flush()
        return process


def _end(process: subprocess.Popen[bytes], lifeline: BinaryIO, *, guarded: bool) -> None:
    """End a sandbox with all that it started.

    Its guard does that (see `wmtp.sandbox.isolation.isolate`), if there is one.
    """
    with contextlib.suppress(BrokenPipeError):  # it ended before it had read its whole request
        lifeline.close()
    if guarded:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GUARD_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Pipe:
    """Pipe whose ends are closed only once.

    Another thread may have got the number of a closed one.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.reading, self.writing = os.pipe()
        self._open = {self.reading, self.writing}
        stack.callback(self.close)

    def close(self, *ends: int) -> None:
        """Close these ends, or both."""
        for end in ends or tuple(self._open):
            if end in self._open:
                self._open.discard(end)
                os.close(end)


def _read(descriptor: int, deadline: float, most: int) -> tuple[bytes | None, bool]:
    """Read to the end, to the deadline, or past ``most`` bytes.

    Returns:
        the bytes, None if the other side took too long; and whether they are at most ``most``.
    """
    parts: list[bytes] = []
    size = 0
    waiting = select.poll()  # select takes no descriptor above 1023, and each sandbox has some
    waiting.register(descriptor, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not waiting.poll(1000 * left):
            return None, True
        part = os.read(descriptor, 65536)
        if not part:
            return b"".join(parts), True
        parts.append(part)
        size += len(part)
        if size > most:
            return b"".join(parts), False

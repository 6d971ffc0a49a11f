"""Processes that have imported torch already: a command in a process of its own, without seconds of imports.

One server imports all that ``wmtp run`` imports, and forks for each command; a launcher that it has forked forks its ranks.
Each has its own standard streams, environment, working folder, signals and exit code. The imports are not its own, nor is the
seed of Python's hashes: a test of what is imported, of how an interpreter starts, or of a result that must not depend on the
order of a set starts its process by `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import logging
import math
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import IO, Any

__all__ = ["Process", "Server"]

_MODULES = (
    "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.launcher.api", "torch.nn.attention",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.modeling_utils",
    "transformers.generation.utils", "safetensors.torch", "wmtp.builtin", "wmtp.cli.commands", "wmtp.training.run",
    "wmtp.evaluation.command", "wmtp.exporting.command", "wmtp.reporting", "wmtp.launchers.torchrun",
    "wmtp.models.loaders.scratch", "wmtp.models.reward", "wmtp.data.prepare", "wmtp.data.render", "wmtp.data.store_writer",
    "wmtp.loss.torch_backend.plain", "wmtp.storage.file", "wmtp.tokenizers.load", "wmtp_algos", "wmtp_storage",
)  # fmt: skip
#: read where torch is imported
_QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_COMMAND = "from wmtp.cli import run_from_shell\nrun_from_shell()"


class Server:
    """Start processes that have imported torch already."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="preloaded-")
        self.address = os.path.join(self._folder.name, "socket")
        words = [sys.executable, __file__, self.address]
        self._process = subprocess.Popen(words, env=os.environ | _QUIET, stdin=subprocess.PIPE)
        deadline = time.monotonic() + 300
        while not os.path.exists(self.address):
            assert self._process.poll() is None, "the server did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self) -> None:
        """End the server, and not what it has started."""
        self._process.communicate()
        self._folder.cleanup()

    def start(self, *words: object, code: str = _COMMAND, **options: Any) -> Process:
        """Start ``wmtp WORDS``, or other code with these words as ``sys.argv[1:]``; options as `Process` takes them."""
        return Process(self.address, [*map(str, words)], code, **options)

    def run(self, *words: object, code: str = _COMMAND, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess:
        """Run it to its end, and return what it printed."""
        process = self.start(*words, code=code, **options)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Process:
    """A process that the server has forked, used like `subprocess.Popen`.

    Args:
        address: of the server.
        words: its arguments.
        code: what it runs.
        stdout, stderr: an open file; default: a pipe, read as text.
        cwd, env: its own; default: those of this process.
        start_new_session: whether it is the first of a group, as a command in a terminal is.
    """

    def __init__(
        self,
        address: str,
        words: list[str],
        code: str,
        *,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: dict[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args, self.returncode = words, None
        variables = (dict(os.environ) if env is None else env) | _QUIET
        facts = {"words": words, "code": code, "cwd": os.path.abspath(cwd or os.getcwd()), "env": variables}
        request = json.dumps(facts | {"session": start_new_session}).encode()
        given, ends = [], []
        for stream in (stdout, stderr):
            if stream is None:
                end, write = os.pipe()
                ends.append(os.fdopen(end, encoding="utf-8", errors="backslashreplace"))
            else:
                write = os.dup(stream.fileno())
                ends.append(None)
            given.append(write)
        self.stdout, self.stderr = ends
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(address)
        socket.send_fds(self._line, [len(request).to_bytes(4, "big")], given)
        self._line.sendall(request)
        for write in given:
            os.close(write)
        self._answers = self._line.makefile()
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            return self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code."""
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._line.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Read all that it prints, and wait for its end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        said: dict[int, str] = {}
        streams = [(number, stream) for number, stream in enumerate((self.stdout, self.stderr)) if stream is not None]
        readers = [threading.Thread(target=lambda n=n, s=s: said.update({n: s.read()}), daemon=True) for n, s in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        for _, stream in streams:
            stream.close()
        return said.get(0), said.get(1)

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs still."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _serve(address: str) -> dict[str, Any]:
    """Fork for each request; return only in the processes that were forked, with what they are to run."""
    for name in _MODULES:
        importlib.import_module(name)
    _prepare()
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ["1"]
    assert len(threads) == 1, "a process with several threads must not fork: a module in _MODULES starts one"
    gc.collect()
    gc.freeze()  # what is never collected is never written, and its memory stays shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(ended, False)
    signal.set_wakeup_fd(wake)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    lines: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, ended, 0], [], [])
        if 0 in ready:
            os._exit(0)
        if ended in ready:
            os.read(ended, 4096)
            _report(lines)
        if listener in ready:
            line, _ = listener.accept()
            request, streams = _receive(line)
            pid = os.fork()
            if pid == 0:
                for held in (listener, *lines.values()):
                    held.close()
                os.close(ended)
                os.close(wake)
                _become(request, streams)
                line.sendall(f"{os.getpid()}\n".encode())
                line.close()
                return request
            for stream in streams:
                os.close(stream)
            lines[pid] = line


def _prepare() -> None:
    """Compute what each run would compute once: which plugins there are, and transformers' table of a model's former names.

    The text that a run generates at its end is shorter here: with 64 tokens it is a fifth of a run of eight steps.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from wmtp.plugins.loader import load_plugins
    from wmtp.training import finish

    load_plugins()
    get_checkpoint_conversion_mapping("llama")
    finish._SAMPLE_TOKENS = 8


def _report(lines: dict[int, socket.socket]) -> None:
    """Tell the tests of the processes that have ended."""
    while lines:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with lines.pop(pid) as line, contextlib.suppress(OSError):  # nobody waits for it any more
            line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _receive(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, streams, _, _ = socket.recv_fds(line, 4, 2)
    wanted = int.from_bytes(size, "big")
    content = b""
    while len(content) < wanted:
        content += line.recv(wanted - len(content))
    return json.loads(content), streams


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Take the place that a new process would have."""
    if request["session"]:
        os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    _begin_anew(["wmtp", *request["words"]], request["env"])
    sys.path[0] = ""
    atexit.register(gc.unfreeze)  # for libraries that count what is left
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda self, args, env: _Rank(args, env, self._stdout, self._stderr)


def _begin_anew(words: list[str], variables: dict[str, str]) -> None:
    """Forget what belongs to the process that has forked this one."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None
    logging.getLogger("wmtp").handlers.clear()
    sys.argv[:] = words


class _Rank:
    """A rank that torchrun's launcher forks, where it would start ``python -m MODULE`` or ``python SCRIPT``."""

    def __init__(self, words: tuple[str, ...], env: dict[str, str], stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self.args, self.returncode = words, None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        for number, stream in ((1, stdout), (2, stderr)):
            if stream is not None:
                os.dup2(stream.fileno(), number)
        os.closerange(3, 1024)  # the launcher's sockets
        atexit._clear()  # and its temporary folders are its own to remove
        words = tuple(word for word in words[1:] if word != "-u")
        _begin_anew(list(words[words[0] == "-m" :]), env)
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as name:
            name.write(f"rank-{env['RANK']}")
        code = 1
        try:
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        # the launcher's threads and connections, of which this process has the traces, cannot be taken apart here
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code


if __name__ == "__main__":
    # an error that this process does not foresee reaches the top of its only script, and ends it as Python does
    _job = _serve(sys.argv[1])
    exec(compile(_job["code"], "<string>", "exec"), {"__name__": "__main__"})

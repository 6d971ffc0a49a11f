"""Control groups of sandboxes, on the real file system of the kernel; the two controllers only where they can be had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wmtp.sandbox import Limits, Sandbox
from wmtp.sandbox.cgroup import Cgroup, find_parent

#: a limit that every group has, whatever controllers there are
ANY = {"cgroup.max.depth": 1}


@pytest.fixture
def parent() -> Path:
    found = find_parent(ANY)
    if found is None:
        pytest.skip("no cgroup2 here in which this user can make groups")
    return found


def _groups(parent: Path) -> list[Path]:
    return list(parent.glob(f"wmtp-sandbox-{os.getpid()}-*"))


def test_a_group_ends_with_all_its_processes(parent: Path) -> None:
    group = Cgroup(parent, ANY)
    assert (group.folder / "cgroup.max.depth").read_text() == "1\n"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as process:
        (group.folder / "cgroup.procs").write_text(str(process.pid))
        group.end()
        assert process.wait(60) == -9
    assert not group.folder.exists()


def test_a_place_without_the_controllers_is_none(parent: Path, tmp_path: Path) -> None:
    assert find_parent({"nothing.max": 1}) is None
    assert find_parent(ANY, tmp_path) is None
    assert _groups(parent) == []


def test_what_a_killed_process_left_is_removed(parent: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    left, own = parent / f"wmtp-sandbox-{int(dead.stdout)}-0", Cgroup(parent, ANY)
    left.mkdir()
    try:
        assert find_parent(ANY) == parent
        assert not left.exists()
        assert own.folder.exists()
    finally:
        own.end()


def test_all_of_a_sandbox_is_in_its_group(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sandbox, "_group_limits", lambda _: ANY)
    sandbox = Sandbox(Limits(seconds=120))
    seen: list[int] = []

    def look() -> None:
        deadline = time.monotonic() + 60
        while len(seen) < 4 and time.monotonic() < deadline:
            seen[:] = [number for group in _groups(parent) for number in map(int, (group / "cgroup.procs").read_text().split())]
            time.sleep(0.02)
        for number in seen:
            os.kill(number, signal.SIGCONT)  # which the solution waits for, and all others ignore

    watcher = threading.Thread(target=look)
    watcher.start()
    code = "import os, signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])\n"
    code += "if os.fork(): signal.sigwait([signal.SIGCONT]); print(42)\nelse: os.setsid(); time.sleep(600)\n"
    outcome = sandbox.run_program(code, "", "42")
    watcher.join()
    assert len(seen) == 4, "guard, first process, solution and its child"
    assert outcome.passed, outcome.detail
    assert _groups(parent) == []


@pytest.mark.parametrize("what", ["memory", "processes"])
def test_the_group_bounds_memory_and_processes(what: str) -> None:
    sandbox = Sandbox(Limits(seconds=20, memory_mb=64, processes=4, disk_mb=4))
    if sandbox._groups is None:
        assert "no cgroup" in sandbox.describe()
        pytest.skip("no cgroup2 here with the controllers memory and pids in which this user can make groups")
    assert "cgroup: 260 MB" in sandbox.describe()
    group = Cgroup(sandbox._groups, {**sandbox._group_limits(), "memory.max": 2**25, "pids.max": 3})
    join = f"open({str(group.folder / 'cgroup.procs')!r}, 'w').write('0')\n"
    act = {"memory": "bytearray(2**27)", "processes": "import os; [os.fork() for _ in range(4)]"}[what]
    done = subprocess.run([sys.executable, "-c", f"{join}{act}"], capture_output=True)
    group.end()
    assert done.returncode != 0

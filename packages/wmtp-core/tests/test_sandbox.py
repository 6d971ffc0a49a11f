"""Hostile solutions: each must fail, and nothing outside its sandbox may notice."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest

from wmtp.sandbox import Limits, Sandbox

TESTS = "assert f(2) == 4\nassert f(-1) == -2\n"
LIMITS = Limits(seconds=60, memory_mb=256, disk_mb=4, output_kb=64)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    if sys.platform != "linux":
        pytest.skip("namespaces are Linux's")
    return Sandbox(LIMITS)


@pytest.fixture(scope="module")
def hasty(sandbox: Sandbox) -> Sandbox:
    """Allows a second, for what never ends."""
    return Sandbox(attrs.evolve(LIMITS, seconds=1))


def test_right_and_wrong_solutions(sandbox: Sandbox) -> None:
    assert sandbox.run_tests("def f(x):\n    return 2 * x\n", TESTS, names=["f"]).passed
    assert sandbox.run_tests("f = lambda x: 3 * x\n", TESTS, names=["f"]).detail.startswith("failed: AssertionError")
    assert "SyntaxError" in sandbox.run_tests("def f(x:", TESTS, names=["f"]).detail
    assert "NameError" in sandbox.run_tests("def g(x):\n    return 2 * x\n", TESTS, names=["f"]).detail


def test_values_of_every_plain_type_come_through(sandbox: Sandbox) -> None:
    tests = (
        "value = [1, -2**200, 0.1, float('inf'), 1j, 'ü\\ud800', b'x', None, True, (1, (2,)), {1, 2}, "
        "frozenset([3]), {'a': {1: 2}}]\n"
        "back = f(value, named=value)\nassert back == [value, value]\n"
        "assert [type(x) for x in back[0]] == [type(x) for x in value]\n"
        "thing = make(7)\nassert read(thing) == 7\n"
        "try:\n    fail()\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    raise AssertionError\n"
    )
    code = (
        "def f(x, named):\n    return [x, named]\nclass make:\n    def __init__(self, x): self.x = x\n"
        "def read(thing): return thing.x\ndef fail(): raise ValueError('no')\n"
    )
    outcome = sandbox.run_tests(code, tests, names=["f", "make", "read", "fail"])
    assert outcome.passed, outcome.detail


def test_a_process_with_a_thousand_open_files_has_sandboxes_too(sandbox: Sandbox) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this process may not open so many")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert sandbox.run_tests("def f(x):\n    return 2 * x\n", TESTS, names=["f"]).passed
        assert sandbox.run_program("print(input())", "1", "1").passed
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_programs_are_judged_by_what_they_print(sandbox: Sandbox) -> None:
    double = "print(2 * int(input()))\n"
    assert sandbox.run_program(double, "21\n", "42\n").passed
    assert sandbox.run_program(double, "21\n", " 42 \n\n").passed
    assert sandbox.run_program(double, "21\n", "43\n").detail == "failed: another output"
    assert "ValueError" in sandbox.run_program(double, "x\n", "42\n").detail
    assert not sandbox.run_program("print(42)\nraise SystemExit(3)\n", "", "42").passed


CHEATS = {
    "exit": "import sys\nsys.exit(0)\n",
    "hard exit": "import os\nos._exit(0)\n",
    "exit when called": "import os\ndef f(x):\n    os._exit(0)\n",
    "patched builtins": (
        "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\n"
        "builtins.__dict__['__debug__'] = False\n"
        "class Yes:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    def __bool__(self): return True\ndef f(x): return Yes()\n"
    ),
    "lying int": "class I(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "def f(x): return I(5)\n",
    "success marker": (
        "import os, sys, json\nfor number in range(3, 64):\n    for text in ('\"passed\"', 'passed', "
        "'{\"value\": true}'):\n"
        "        try: os.write(number, text.encode() + b'\\n')\n        except OSError: pass\n"
        "print('passed'); sys.stdout.flush()\n"
    ),
    "raise in the test": "def f(x):\n    raise SystemExit(0)\n",
    "frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        frame.f_globals['TESTS'] = ''\n"
    "        frame = frame.f_back\n",
    "infinite loop": "while True: pass\n",
    "infinite loop when called": "def f(x):\n    while True: pass\n",
    "infinite output": "while True: print('x' * 10000)\n",
    "infinite answer": "import os\ndef f(x):\n    while True: os.write(4, b'x' * 65536)\n",
    "huge answer": "def f(x): return 'x' * 10**8\n",
    "deep answer": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a\n",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(10**7))\n",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
    "ignores signals": "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except OSError: pass\n"
    "time.sleep(1000)\n",
}
#: only the limit of time ends these
ENDLESS = ("infinite loop", "infinite loop when called", "infinite output", "fork bomb", "ignores signals")


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail(sandbox: Sandbox, hasty: Sandbox, name: str) -> None:
    started = time.monotonic()
    outcome = (hasty if name in ENDLESS else sandbox).run_tests(CHEATS[name], TESTS, names=["f"])
    assert not outcome.passed
    assert time.monotonic() - started < 60


def _attempt(sandbox: Sandbox, code: str) -> str:
    """Return what a solution's function ``attempt`` answers; it must not raise."""
    tests = "answer = attempt()\nraise Exception('said ' + repr(answer))\n"
    detail = sandbox.run_tests(code, tests, names=["attempt"]).detail
    assert detail.startswith("failed: Exception: said "), detail
    return detail.removeprefix("failed: Exception: said ")


def test_home_files_and_environment_are_not_there(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "swordfish")
    secret = tmp_path / "secret.txt"
    secret.write_text("swordfish")
    places = [
        "/root",
        "/home",
        "/etc/passwd",
        "/proc/1/environ",
        "/proc/self/environ",
        str(Path.home()),
        str(secret),
        os.getcwd(),
    ]
    code = (
        "import os\ndef attempt():\n    found = [k for k, "
        "v in os.environ.items() if 'swordfish' in v or 'HOME' == k and v != '/tmp']\n"
        f"    for place in {places!r}:\n        try:\n            with open(place): found.append(place)\n"
        "        except IsADirectoryError: found += os.listdir(place)\n        except OSError: pass\n    return found\n"
    )
    answer = _attempt(sandbox, code)
    prefix = Path(sys.base_prefix)
    # where the Python that runs lies in the user's home, its own folder is there, and nothing beside it
    inside = prefix.relative_to(Path.home()).parts[:1] if prefix.is_relative_to(Path.home()) else ()
    assert answer in ("[]", repr(list(inside)), repr(list(inside) * 2))


def test_nothing_outside_the_temporary_folder_is_written(sandbox: Sandbox, tmp_path: Path) -> None:
    places = [str(tmp_path), "/", "/usr", "/usr/lib", sys.base_prefix, os.path.dirname(os.__file__), "/dev", "/dev/shm"]
    code = (
        "import os\ndef attempt():\n    written = []\n"
        f"    for place in {places!r} + ['/tmp']:\n        try:\n            with open(os.path.join(place, "
        f"'mark'), 'w') as file: file.write('x')\n"
        "            written.append(place)\n        except OSError: pass\n    return written\n"
    )
    assert _attempt(sandbox, code) == "['/tmp']"
    assert not (tmp_path / "mark").exists()
    fill = (
        "def attempt():\n    try:\n        for n in range(100):\n"
        "            with open(f'/tmp/{n}', 'wb') as file: file.write(bytes(10**6))\n"
    )
    assert _attempt(sandbox, fill + "    except OSError as error: return error.errno\n") in ("28", "27")


def test_there_is_no_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = (
            "import socket\ndef attempt():\n    reached = []\n"
            f"    for address in (('127.0.0.1', {port}), ('1.1.1.1', 53), ('169.254.169.254', 80)):\n"
            "        try: socket.create_connection(address, 1); reached.append(address)\n"
            "        except OSError: pass\n    return reached\n"
        )
        assert _attempt(sandbox, code) == "[]"


def test_other_processes_cannot_be_killed_or_seen(sandbox: Sandbox) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        pids = [victim.pid, os.getpid(), os.getppid()]
        code = (
            "import os, signal\ndef attempt():\n    hit = []\n"
            f"    for pid in {pids!r} + [os.getppid()]:\n        try:\n            if pid > 1: os.kill(pid, "
            f"signal.SIGKILL); hit.append(pid)\n"
            "        except OSError: pass\n    return hit, os.getppid()\n"
        )
        assert _attempt(sandbox, code) == "([], 1)"
        assert victim.poll() is None
        victim.kill()
    everybody = "import os, signal\ndef f(x):\n    os.kill(-1, signal.SIGKILL)\n    os.killpg(0, signal.SIGKILL)\n"
    assert not sandbox.run_tests(everybody, TESTS, names=["f"]).passed


def test_rights_cannot_be_won_back(sandbox: Sandbox) -> None:
    code = (
        "import ctypes, os\ndef attempt():\n    libc, won = ctypes.CDLL(None, use_errno=True), []\n"
        "    if libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0: won.append('mount')\n"
        "    if libc.unshare(0x10000000) == 0: won.append('unshare')\n"
        "    if libc.chroot(b'/tmp') == 0: won.append('chroot')\n"
        "    try: os.setuid(0); won.append('root')\n    except OSError: pass\n    return won, os.getuid() != 0\n"
    )
    assert _attempt(sandbox, code) == "([], True)"


ESCAPE = """
import ctypes, os, time
libc = ctypes.CDLL(None)
for _ in range(2):  # in a session of its own, deaf to its parent's death, and so is its child
    libc.prctl(15, b"escaped-%(mark)d", 0, 0, 0)
    libc.prctl(1, 0, 0, 0, 0)
    try: os.setsid()
    except OSError: pass
    if os.fork() != 0: break
os.close(1)
time.sleep(60)
"""


def _running(mark: int) -> list[str]:
    """Processes of `ESCAPE`."""
    found = []
    for place in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if place.read_text().strip() == f"escaped-{mark}":
                found.append(place.parent.name)
    return found


def _survivors(mark: int) -> list[str]:
    """Those that are left after some time to die."""
    for _ in range(600):
        if not _running(mark):
            break
        time.sleep(0.1)
    return _running(mark)


def test_nothing_outlives_its_sandbox() -> None:
    mark = os.getpid() % 100_000
    sandbox = Sandbox(Limits(seconds=1))
    assert sandbox.run_program(ESCAPE % {"mark": mark}, "", "").detail == "timed out"
    assert _survivors(mark) == []


def test_a_sandbox_ends_with_the_process_that_started_it() -> None:
    mark = 100_000 + os.getpid() % 100_000
    code = ESCAPE % {"mark": mark}
    owner = f"from wmtp.sandbox import Limits, Sandbox\nSandbox(Limits(seconds=600)).run_program({code!r}, '', '')"
    with subprocess.Popen([sys.executable, "-c", owner]) as process:
        while not _running(mark):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert _survivors(mark) == []


def test_the_isolation_in_force_is_said(sandbox: Sandbox) -> None:
    assert sandbox.describe().startswith("namespaces: own user, mounts, network (none)")
    weak = Sandbox(Limits(seconds=60), isolation="process")
    hasty = Sandbox(Limits(seconds=1), isolation="process")
    assert "NOT out of reach" in weak.describe()
    assert weak.run_tests("def f(x):\n    return 2 * x\n", TESTS, names=["f"]).passed
    assert not weak.run_tests(CHEATS["hard exit"], TESTS, names=["f"]).passed
    assert not hasty.run_tests(CHEATS["infinite loop"], TESTS, names=["f"]).passed

"""Hostile programs against the sandbox itself, run as the user of the tests, and as an ordinary user where that is root."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from wmtp.sandbox import Limits, Sandbox

if sys.platform != "linux":
    pytest.skip("namespaces are Linux's", allow_module_level=True)

_NOBODY = 65534

#: ways to end the guard, or to live on after it; every one is tried by a process of its own, which then sleeps
KILLERS = {
    "own group": "os.kill(0, signal.SIGKILL)",
    "everybody": "os.kill(-1, signal.SIGKILL)",
    "first process": "[os.kill(1, number) for number in range(1, 65)]",
    "parent": "os.kill(os.getppid(), signal.SIGKILL)",
    "parent's group": "os.killpg(os.getpgid(1), signal.SIGKILL)",
    "join the first process's group": "os.setpgid(0, os.getpgid(1)); os.kill(0, signal.SIGKILL)",
    "session": "os.setsid(); os.kill(0, signal.SIGKILL)",
    "limits of the first process": "resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))",
    "trace the first process": "libc.ptrace(16, 1, 0, 0); os.kill(1, signal.SIGKILL)",
    "signal by a pipe": "fcntl.fcntl(1, fcntl.F_SETOWN, 0); fcntl.fcntl(1, fcntl.F_SETSIG, 9)",
    "pidfd of the first process": "signal.pidfd_send_signal(os.pidfd_open(1), signal.SIGKILL)",
    "every descriptor": "os.closerange(0, 4096)",
    "new namespaces": "libc.unshare(0x10000000 | 0x20000000); os.fork()",
}

_PROGRAM = """
import ctypes, fcntl, os, resource, signal, sys, time
libc = ctypes.CDLL(None)
libc.prctl(15, {mark!r}, 0, 0, 0)
libc.prctl(1, 0, 0, 0, 0)  # forgets the signal of its parent's death
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for trick in {tricks!r}:
    if os.fork() == 0:
        libc.prctl(1, 0, 0, 0, 0)
        # a process of its own tries, so that this one is there to be found if that ended the guard
        if os.fork() == 0:
            time.sleep(0.5)  # all others have left the process group by then
            try: exec(trick)
            except BaseException: pass
            os._exit(0)
        try: os.setsid()
        except OSError: pass
        if os.fork() == 0:
            try: os.closerange(0, 64)
            except OSError: pass
        while True: time.sleep(1)
try: os.setsid()
except OSError: pass
while True: time.sleep(1)
"""

#: what a solution may not open, and the error that it then sees
DOORS = {
    "AF_VSOCK": "socket.socket(40, socket.SOCK_STREAM)",
    "AF_VSOCK with high bits": "call('socket', ctypes.c_ulong((1 << 32) | 40), 1, 0)",
    "AF_NETLINK": "socket.socket(16, socket.SOCK_RAW)",
    "AF_ALG": "socket.socket(38, socket.SOCK_SEQPACKET)",
    "a pair of TIPC": "call('socketpair', 30, 1, 0, ctypes.create_string_buffer(8))",
    "io_uring": "call('io_uring_setup', 1, ctypes.create_string_buffer(256))",
    "add_key": "call('add_key', b'user', b'x', b'y', 1, -2)",
    "keyctl": "call('keyctl', 0, -3, 0)",
    "memfd": "os.memfd_create('x')",
    "System V memory": "call('shmget', 0, 1 << 20, 0o1600)",
    "System V messages": "call('msgget', 0, 0o1600)",
    "System V semaphores": "call('semget', 0, 1, 0o1600)",
    "POSIX messages": "call('mq_open', b'x', 0o102, 0o600, 0)",
    "POSIX memory": "open('/dev/shm/x', 'w')",
    "ptrace": "call('ptrace', 16, os.getppid(), 0, 0)",
    "userfaultfd": "call('userfaultfd', 0)",
    "bpf": "call('bpf', 0, 0, 0)",
    "user namespace by unshare": "call('unshare', 0x10000000)",
    "user namespace by clone": "call('clone', 0x10000011, 0, 0, 0, 0)",
    "limits of another": "resource.prlimit(1, resource.RLIMIT_CPU)",
    "locked ranges": "fcntl.lockf(os.open('/tmp/l', os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX, 1, 5)",
    "locked ranges with high bits": "call('fcntl', 1, HIGH | 6, LOCK)",
    "locked ranges of an open file": "fcntl.fcntl(1, 37, LOCK)",
    "access list": "os.close(os.open('/tmp/a', os.O_CREAT)); os.setxattr('/tmp/a', 'system.posix_acl_access', ACL)",
    "attribute": "os.close(os.open('/tmp/a', os.O_CREAT)); os.setxattr('/tmp/a', 'user.x', b'x' * 60_000)",
    "attribute by a folder": "shut(38, lambda: call(463, 1, b'x', 0, b'user.x', 0, 0))",
    "asynchronous input": "call('io_setup', 1000, ctypes.byref(ctypes.c_ulong()))",
    "inotify": "call('inotify_init1', 0)",
    "huge pages": "shut(12, lambda: call('mmap', 0, 1 << 21, 3, 0x40022, -1, 0))",
    "send buffer": "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)",
    "send buffer with high bits": "call('setsockopt', socket.socketpair()[0].detach(), HIGH | 1, 7, INT, 4)",
    "size of a pipe": "fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
    "time of a device": "os.utime('/dev/null')",
    "mode of a device": "os.chmod('/dev/zero', 0o777)",
    "name of the machine": "if os.uname().nodename == 'sandbox': raise OSError",
    "queued signals": "signal.pthread_sigmask(0, [40]); [refused(libc.sigqueue(os.getpid(), 40, 0)) for _ in range(1000)]",
    "timers": "[call('timer_create', 1, None, INT) for _ in range(1000)]",
    "secret memory": "fd = call('memfd_secret', 0); os.ftruncate(fd, 4096); mmap.mmap(fd, 4096)",
    "priority": "os.nice(-5)",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "a terminal's input": "fcntl.ioctl(0, 0x5412, b'x')",
    "lease": "fcntl.fcntl(os.open('/usr', os.O_RDONLY), 1024, 0)",
}
#: programs that the kernel must end: system calls of another architecture, which no filter of this one sees
ENDED = {
    "int 0x80": "m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex('b814000000cd80c3'))\n"
    "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
    "x32": "ctypes.CDLL(None).syscall(0x40000000 | 39)",
}

_DOORS = """
import ctypes, fcntl, mmap, os, resource, signal, socket, struct
HIGH = 1 << 32  # bits of an argument that the kernel does not read
INT = ctypes.byref(ctypes.c_int(1))
LOCK = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 5, 1, 0)
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 7, 2**32 - 1) for tag in (1, 4, 32))
libc, seccomp = ctypes.CDLL(None, use_errno=True), None
def call(name, *arguments):
    arguments = [ctypes.c_ulong(each) if isinstance(each, int) and each >> 32 == 1 else each for each in arguments]
    result = libc.syscall(NUMBERS.get(name, name), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def refused(result):
    if result < 0:
        raise OSError
def shut(unless, act):  # an error of the kernel's own says that the door was open
    try: act()
    except OSError as error:
        if error.errno != unless: raise
def attempt():
    opened = []
    for name, door in DOORS.items():
        try: exec(door, globals())
        except OSError: continue
        opened.append(name)
    return opened
"""


def _named(mark: str) -> list[str]:
    """Processes with this name, after some time to die."""
    found = [""]
    for _ in range(600):
        found = [comm.parent.name for comm in Path("/proc").glob("[0-9]*/comm") if _text(comm) == mark]
        if not found:
            break
        subprocess.run(["sleep", "0.1"], check=True)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(Limits(seconds=60, memory_mb=256, disk_mb=4, processes=64))


def test_nobody_ends_the_guard_or_outlives_it() -> None:
    sandbox = Sandbox(Limits(seconds=2, memory_mb=256, disk_mb=4, processes=64))  # most of it never ends
    mark = f"hostile-{os.getpid() % 100_000}"
    groups = ("own group", "everybody", "parent's group")  # these end the solution itself, and so the other attempts
    for tricks in ([trick for name, trick in KILLERS.items() if name not in groups], *([KILLERS[name]] for name in groups)):
        outcome = sandbox.run_program(_PROGRAM.format(tricks=tricks, mark=mark.encode()), "", "")
        assert not outcome.passed
        assert _named(mark) == []


def test_a_killed_guard_takes_all_with_it(sandbox: Sandbox) -> None:
    mark = f"orphan-{os.getpid() % 100_000}"
    owner = (
        "import sys; from wmtp.sandbox import Limits, Sandbox\n"
        f"Sandbox(Limits(seconds=600)).run_program({_PROGRAM.format(tricks=['pass'], mark=mark.encode())!r}, '', '')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", owner], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as process:
        while not any(_text(comm) == mark for comm in Path("/proc").glob("[0-9]*/comm")):
            assert process.poll() is None
            subprocess.run(["sleep", "0.05"], check=True)
        guards = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert guards
        for guard in guards:
            os.kill(int(guard), 9)
        assert _named(mark) == []
        process.kill()


def test_doors_of_the_kernel_are_shut(sandbox: Sandbox) -> None:
    names = ("socket", "socketpair", "io_uring_setup", "add_key", "keyctl", "shmget", "msgget", "semget", "mq_open")
    names += ("ptrace", "userfaultfd", "bpf", "unshare", "clone", "fcntl", "io_setup", "inotify_init1", "mmap", "setsockopt")
    names += ("timer_create", "memfd_secret")
    numbers = {name: ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name(name.encode()) for name in names}
    code = _DOORS.replace("NUMBERS", repr(numbers)).replace("DOORS", repr(DOORS))
    outcome = sandbox.run_tests(code, "opened = attempt()\nassert opened == [], opened\n", names=["attempt"])
    assert outcome.passed, outcome.detail
    works = "import os, socket, threading\ndef f():\n    a, b = socket.socketpair()\n    a.send(b'x')\n    said = []\n"
    works += "    thread = threading.Thread(target=lambda: said.append(b.recv(1)))\n    thread.start()\n    thread.join()\n"
    works += "    if os.fork() == 0: os._exit(7)\n    return said, os.waitstatus_to_exitcode(os.wait()[1])\n"
    outcome = sandbox.run_tests(works, "assert f() == ([b'x'], 7)\n", names=["f"])
    assert outcome.passed, outcome.detail


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86-64")
@pytest.mark.parametrize("name", ENDED)
def test_doors_of_another_architecture_end_the_program(sandbox: Sandbox, name: str) -> None:
    outcome = sandbox.run_program(f"import ctypes, mmap\n{ENDED[name]}\nprint('alive')\n", "", "alive")
    assert outcome.detail.startswith("failed: exit code"), outcome.detail


def test_files_are_few_and_small_together(sandbox: Sandbox) -> None:
    code = (
        "import os\ndef attempt():\n    made = 0\n    try:\n        while made < 20_000:\n"
        "            os.close(os.open(f'/tmp/{made}', os.O_CREAT)); made += 1\n    except OSError as error: pass\n"
        "    return made\ndef elsewhere():\n    made = []\n"
        "    for place in ('/', '/usr', '/lib', '/bin', '/dev', '/root', '/old'):\n"
        "        try: os.mkdir(place + '/mark'); made.append(place)\n        except OSError: pass\n    return made\n"
    )
    tests = "made = attempt()\nassert 4_000 < made < 8_200, made\nassert elsewhere() == [], elsewhere()\n"
    outcome = sandbox.run_tests(code, tests, names=["attempt", "elsewhere"])
    assert outcome.passed, outcome.detail


@pytest.fixture
def ordinary_python() -> Iterator[list[str]]:
    """Command that runs this Python, with the same modules, as a user without rights."""
    if os.getuid() != 0 or not shutil.which("setpriv") or not shutil.which("unshare"):
        pytest.skip("only root can become another user, by util-linux; as an ordinary user the tests above are the proof")
    place = tempfile.mkdtemp(dir="/tmp")
    os.chmod(place, 0o755)
    become, python = f"setpriv --reuid={_NOBODY} --regid={_NOBODY} --clear-groups", f"{place}/bin/python3.{sys.version_info[1]}"
    # this Python may lie in root's home, which nobody else can enter
    shell = f'mount --bind "{sys.base_prefix}" {place} && exec {become} {python} "$@"'
    probe = f"{become} unshare --user --pid --fork --mount --net --ipc true"
    if subprocess.run(["sh", "-c", f"cd / && {probe}"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets ordinary users make no namespaces: there, pass-at-k refuses to start")
    yield ["unshare", "--mount", "sh", "-c", shell, "sh"]
    os.rmdir(place)


def _run_as_nobody(command: list[str], folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [path for path in sys.path if path and os.path.isdir(path) and not path.startswith(sys.base_prefix)]
    source = str(Path(sys.modules["wmtp"].__path__[0]).parent)
    environment = {"PATH": os.environ["PATH"], "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([source, *paths])
    return subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def _pytest(command: list[str], file: Path, *arguments: str) -> None:
    folder = tempfile.mkdtemp(dir="/tmp")
    try:
        shutil.copy(file, folder)
        os.chmod(folder, 0o755)
        given = ("-m", "pytest", f"{folder}/{file.name}", "-c", "/dev/null", "-p", "no:cacheprovider", "-p", "no:xdist", "-q")
        result = _run_as_nobody(command, folder, *given, "-rs", *arguments)
    finally:
        shutil.rmtree(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_the_same_as_an_ordinary_user(ordinary_python: list[str]) -> None:
    _pytest(ordinary_python, Path(__file__), "-k", "guard or doors or files")


@pytest.mark.slow
def test_every_cheat_as_an_ordinary_user(ordinary_python: list[str]) -> None:
    _pytest(ordinary_python, Path(__file__).with_name("test_sandbox.py"))

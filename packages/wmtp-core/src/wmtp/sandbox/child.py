"""First program of a sandbox: isolates itself, then runs the code it is sent.

Started as ``python -I -S -B child.py``. It uses the standard library alone and nothing of wmtp. By the order of `main`: own
namespaces, a root folder with nothing in it but Python and an empty working folder, limits, an unprivileged user without any
capability; only then the first line of code that is not ours.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE, _DETACH = 1, 2, 4, 32, 4096, 16384, 1 << 18, 2
_SET_PDEATHSIG, _CAPBSET_DROP, _SET_SECUREBITS, _SET_NO_NEW_PRIVS = 1, 24, 28, 38
_COLLECTIONS = ((list, "l"), (tuple, "t"), (set, "e"), (frozenset, "z"))
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219}
_JOIN_SESSION_KEYRING = 1


def _must(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, what + ": " + os.strerror(error))


def _mount(libc: Any, source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _must(libc.mount(*texts[:3], flags, texts[3]), "mount " + target)


def shut_in(request: dict[str, Any], lifeline: int) -> None:
    """Enter new namespaces and a new root folder. Returns in the first process of the new process namespace.

    This process itself stays outside as its guard: once the lifeline is closed, by whoever holds its other end or by that one's
    death, it kills the first process, and with it the kernel kills the whole namespace. The code inside has no means against
    that, while it can leave its process group and forget the signal of its parent's death.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
    uid, gid = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    is_root = uid == 0 and libc.unshare(flags) == 0
    if not is_root:
        _must(libc.unshare(flags | _NEWUSER), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            with open("/proc/self/" + name, "w") as file:
                file.write(text)
    ended, ending = os.pipe()  # a process that has unshared cannot have threads
    os.set_blocking(ending, False)
    signal.set_wakeup_fd(ending)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    first = os.fork()  # a process namespace begins with the next child
    if first:
        for number in request["pipes"]:
            os.close(number)
        if lifeline in select.select([lifeline, ended], [], [])[0]:
            os.kill(first, signal.SIGKILL)
        _, status = os.waitpid(first, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (lifeline, ended, ending):
        os.close(number)
    libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # a session's keys (Kerberos tickets, say) are inherited; where the kernel has no keys, there is nothing to leave
    libc.syscall(_KEYCTL[os.uname().machine], _JOIN_SESSION_KEYRING, None)
    _new_root(libc, request)
    _drop_rights(libc, request["uid"] if is_root else None)
    libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user forgets it


def _new_root(libc: Any, request: dict[str, Any]) -> None:
    new = request["root"]  # an empty folder to mount on
    _mount(libc, None, "/", None, _REC | _PRIVATE)
    _mount(libc, "sandbox", new, "tmpfs", _NOSUID | _NODEV, f"size={request['disk']},mode=0755")
    root = new + "/root"
    os.mkdir(root)
    for place in request["visible"]:
        target = root + place
        if os.path.islink(place):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(place), target)
            continue
        if os.path.isdir(place):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "w"):
                pass
        _mount(libc, place, target, None, _BIND | _REC)
        if not place.startswith("/dev/"):
            _mount(libc, place, target, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)
    work = root + "/tmp"
    os.makedirs(work, exist_ok=True)
    os.chmod(work, 0o777)
    old = new + "/old"
    os.mkdir(old)
    _must(libc.syscall(_PIVOT_ROOT[os.uname().machine], os.fsencode(new), os.fsencode(old)), "pivot_root")
    os.chdir("/")
    _must(libc.umount2(b"/old", _DETACH), "umount")
    os.rmdir("/old")
    os.chroot("/root")  # inside a chroot the kernel grants no further user namespace
    os.chdir("/tmp")


def _drop_rights(libc: Any, uid: int | None) -> None:
    for capability in range(64):
        libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    if uid is not None:  # root is bound by few limits: an own, unprivileged user for each sandbox
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc.prctl(_SET_SECUREBITS, 0x2F, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _must(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _must(libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def set_limits(limits: dict[str, int]) -> None:
    """Set the resource limits that the kernel enforces for this process and its children."""
    for name, value in limits.items():
        kind = getattr(resource, "RLIMIT_" + name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def encode(value: Any, refs: list[Any], depth: int = 0) -> Any:
    """Plain data as JSON can hold it. Anything else stays here, and only its number goes out."""
    if depth > 200:
        raise ValueError("too deep")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return {"i": hex(int(value))}
    if isinstance(value, float):
        return {"f": float.hex(float(value))}
    if isinstance(value, complex):
        return {"c": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, str):
        return {"s": str.__str__(value).encode("utf-8", "surrogatepass").hex()}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    for kind, name in _COLLECTIONS:
        iterate: Any = kind.__iter__  # not what a subclass makes of it
        if isinstance(value, kind):
            return {name: [encode(element, refs, depth + 1) for element in iterate(value)]}
    if isinstance(value, dict):
        return {"d": [[encode(k, refs, depth + 1), encode(v, refs, depth + 1)] for k, v in dict.items(value)]}
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return {"y": value.__name__}
    refs.append(value)
    return {"r": len(refs) - 1}


def decode(value: Any, refs: Callable[[int], Any]) -> Any:
    """Reverse `encode`; ``refs`` maps a number to its object."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "r":
        return refs(content)
    if kind == "y":
        found = vars(builtins)[content]
        if not isinstance(found, type):
            raise ValueError(content)
        return found
    if kind == "i":
        return int(content, 16)
    if kind == "f":
        return float.fromhex(content)
    if kind == "c":
        return complex(*map(float.fromhex, content))
    if kind == "s":
        return bytes.fromhex(content).decode("utf-8", "surrogatepass")
    if kind == "b":
        return bytes.fromhex(content)
    if kind == "d":
        return {decode(k, refs): decode(v, refs) for k, v in content}
    return {"l": list, "t": tuple, "e": set, "z": frozenset}[kind](decode(element, refs) for element in content)


def _renumbered(value: Any, numbers: list[Any]) -> Any:
    """Replace the object numbers in a message by those of the other side."""
    if isinstance(value, list):
        return [_renumbered(element, numbers) for element in value]
    if isinstance(value, dict):
        return (
            {"r": numbers[value["r"]]} if "r" in value else {kind: _renumbered(part, numbers) for kind, part in value.items()}
        )
    return value


class _Pipes:
    """Lines of JSON to and from the other side."""

    def __init__(self, reading: int, writing: int, most: int) -> None:
        self._in, self._out, self._most = os.fdopen(reading, "rb"), os.fdopen(writing, "wb"), most

    def send(self, message: dict[str, Any]) -> None:
        """Write one message."""
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()

    def receive(self) -> dict[str, Any]:
        """Read one message; EOFError where the other side has gone, or sends more than is allowed."""
        line = self._in.readline(self._most)
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


def serve(request: dict[str, Any], code: str) -> None:
    """Run the untrusted side: execute the code, and answer calls of its names."""
    pipes = _Pipes(request["pipes"][0], request["pipes"][1], request["message"])
    names: dict[str, Any] = {"__name__": "solution"}
    refs: list[Any] = []
    try:
        exec(compile(code, "solution", "exec"), names)
        pipes.send({"ready": True})
    except BaseException as error:
        pipes.send({"error": type(error).__name__, "text": str(error)[:500]})
        return
    while True:
        try:
            call = pipes.receive()
        except EOFError:
            return
        try:
            function = refs[call["ref"]] if "ref" in call else names[call["name"]]
            arguments = [decode(value, refs.__getitem__) for value in call["args"]]
            keywords = {name: decode(value, refs.__getitem__) for name, value in call["kwargs"].items()}
            answer = {"value": encode(function(*arguments, **keywords), refs)}
        except BaseException as error:
            answer = {"error": type(error).__name__, "text": str(error)[:500]}
        pipes.send(answer)


def judge(request: dict[str, Any], code: str) -> None:
    """Run the trusted side: the tests, in which the solution's names call the other sandbox."""
    pipes = _Pipes(request["pipes"][0], request["pipes"][1], request["message"])

    class Remote:
        def __init__(self, **target: Any) -> None:
            self._target = target

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = {name: _out(value) for name, value in kwargs.items()}
            pipes.send({**self._target, "args": [_out(value) for value in args], "kwargs": out})
            answer = pipes.receive()
            if "error" in answer:
                kind = getattr(builtins, str(answer["error"]), None)
                usable = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, AssertionError)
                raise (kind if usable and kind else RuntimeError)(str(answer.get("text", "")))
            return decode(answer["value"], lambda number: Remote(ref=int(number)))

    class References(list[Any]):
        def append(self, value: Any) -> None:
            if not isinstance(value, Remote):
                raise TypeError(f"a test passes a {type(value).__name__}, which cannot be sent to the solution")
            super().append(value)

    def _out(value: Any) -> Any:
        refs = References()
        return _renumbered(encode(value, refs), [remote._target.get("ref") for remote in refs])

    verdict = os.fdopen(request["verdict"], "w")
    try:
        first = pipes.receive()
        if "error" in first:
            result = f"failed: {first['error']}: {first.get('text', '')}"
        else:
            names: dict[str, Any] = {"__name__": "tests"}
            exec(compile(request["setup"], "setup", "exec"), names)
            for name in request["names"]:
                names[name] = Remote(name=name)
            exec(compile(code, "tests", "exec"), names)
            result = "passed"
    except EOFError:
        result = "failed: the solution ended by itself"
    except BaseException as error:
        result = f"failed: {type(error).__name__}: {error}"
    verdict.write(json.dumps(result[:500]) + "\n")
    verdict.flush()


def main() -> None:
    """Read the request from the pipe whose number is the argument, shut in, and run."""
    lifeline = int(sys.argv[1])
    with os.fdopen(lifeline, "rb", closefd=False) as pipe:
        request = json.loads(pipe.readline())
    if request["isolate"]:
        shut_in(request, lifeline)
    else:
        os.close(lifeline)
    set_limits(request["limits"])
    sys.argv = ["solution"]
    code = request["code"]
    if request["mode"] == "serve":
        serve(request, code)
    elif request["mode"] == "judge":
        judge(request, code)
    else:  # a whole program, from standard input to standard output
        del request
        exec(compile(code, "solution", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()

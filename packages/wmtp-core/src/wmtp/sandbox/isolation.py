"""Isolation of the calling process by namespaces, limits and a system-call filter.

`child.py` loads this in the sandbox itself: it uses the standard library alone, and libseccomp by ctypes.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
from typing import Any, NoReturn

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_NEWCGROUP, _NEWTIME = 0x2000000, 0x80
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE, _DETACH = 1, 2, 4, 32, 4096, 16384, 1 << 18, 2
_SET_DUMPABLE, _CAPBSET_DROP, _SET_SECUREBITS, _SET_NO_NEW_PRIVS = 4, 24, 28, 38
#: what a mount has from its file system, and a remount without rights must repeat: flags of statvfs and of mount
_KEPT_FLAGS = ((8, 8), (1024, 1024), (2048, 2048), (4096, 1 << 21))  # noexec, noatime, nodiratime, relatime
_MOST_FILES = 8192  # inodes of the temporary folder; each takes about a kilobyte of the kernel's memory

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EQ, _GE, _MASKED_EQ = 4, 5, 7
_EPERM, _ENOLCK, _ENOSYS, _ENOTSUP = 1, 37, 38, 95
_INT = 0xFFFFFFFF  # the part of an argument that the kernel reads of an int: a program may set the bits above it
#: socket families that Python programs use: AF_UNIX, AF_INET and AF_INET6, all within the empty network namespace
_FAMILIES = (1, 2, 10)
_NAMESPACES = (_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET, _NEWCGROUP, _NEWTIME)
#: memory that no limit of a process counts, doors that a network namespace leaves open, and much of the kernel that no
#: solution of a programming problem has a use for
_REFUSED = (
    *("memfd_create", "shmget", "shmat", "shmctl", "msgget", "msgsnd", "semget", "semop", "semtimedop", "mq_open"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "add_key", "request_key", "keyctl"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp", "userfaultfd", "bpf", "perf_event_open"),
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig"),
    *("fsmount", "fspick", "open_by_handle_at", "name_to_handle_at", "quotactl", "fanotify_init", "vmsplice"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "swapon", "swapoff", "acct", "syslog", "reboot"),
    *("io_setup", "inotify_init", "inotify_init1"),  # the machine, or the user, has few of them
)
#: an access list takes 64 KB of the kernel's memory a file, which the size of a tmpfs does not count
_ATTRIBUTES = ("setxattr", "lsetxattr", "fsetxattr")
_SETXATTRAT = 463  # newer than many a libseccomp
#: commands of fcntl: a lock on a part of a file takes memory that nothing counts (F_SETLK, F_SETLKW, and the OFD ones)
_LOCKS = (6, 7, 37, 38)
_F_SETPIPE_SZ = 1031
_SOL_SOCKET, _SO_SNDBUF, _SO_SNDBUFFORCE = 1, 7, 32
_MAP_HUGETLB = 0x40000  # takes from pages that somebody has set aside for another program


def _must(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, what + ": " + os.strerror(error))


def _mount(libc: Any, source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _must(libc.mount(*texts[:3], flags, texts[3]), "mount " + target)


def isolate(request: dict[str, Any], lifeline: int) -> None:
    """Enter new namespaces and a new root folder.

    Returns in the process that may run the solution. Three processes make a sandbox. This one stays outside as a guard: the
    solution sees no process outside its namespace and is in no process group with one, so it can send it no signal. The next is
    the first process of the new process namespace and only waits: the kernel keeps every signal from within the namespace away
    from it, and with its end kills all processes there, whatever session, group or parent they have given themselves. The third
    becomes the solution.

    The first process ends when the solution does, when the owner of the sandbox closes its lifeline or dies, and when the
    guard dies, which it sees by a pipe: the signal of a parent's death is forgotten with a change of user.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    seccomp = ctypes.CDLL("libseccomp.so.2")
    libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
    uid, gid = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    is_root = uid == 0 and libc.unshare(flags) == 0
    if not is_root:
        _must(libc.unshare(flags | _NEWUSER), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            with open("/proc/self/" + name, "w") as file:
                file.write(text)
    alive, living = os.pipe()  # a process that has unshared cannot have threads
    first = os.fork()  # a process namespace begins with the next child
    if first:
        for number in (*request["pipes"], lifeline, alive):
            os.close(number)
        _end_as(first)
    os.close(living)
    os.setsid()  # else a signal to the solution's process group would reach the guard
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel drops signals to the first process that it has no handler for
    libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)  # nobody traces it, or reads its memory
    _must(libc.sethostname(b"sandbox", 7), "sethostname")
    _new_root(libc, seccomp, request)
    solution = os.fork()
    if solution:
        for number in request["pipes"]:
            os.close(number)
        _drop_rights(libc, None)
        waiting = select.poll()  # select takes no descriptor above 1023
        for descriptor in (lifeline, alive, os.pidfd_open(solution)):
            waiting.register(descriptor, select.POLLIN)
        if {lifeline, alive} & {descriptor for descriptor, _ in waiting.poll()}:
            os._exit(128 + signal.SIGKILL)
        _end_as(solution)
    os.close(lifeline)
    os.close(alive)
    os.setsid()
    _drop_rights(libc, request["uid"] if is_root else None)
    _filter_system_calls(seccomp)
    if not is_root:  # the kernel counts the guard and the first process with those of this user
        request["limits"]["NPROC"] += 2


def _end_as(child: int) -> NoReturn:
    """Wait for a child, and end with its status."""
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _new_root(libc: Any, seccomp: Any, request: dict[str, Any]) -> None:
    new = request["root"]  # an empty folder to mount on
    _mount(libc, None, "/", None, _REC | _PRIVATE)
    _mount(libc, "sandbox", new, "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=1024,mode=0755")
    root, work, old = new + "/root", new + "/root/tmp", new + "/old"
    for folder in (root, work, old):
        os.mkdir(folder)
    # before what is visible: a Python may lie in /tmp
    _mount(libc, "work", work, "tmpfs", _NOSUID | _NODEV, f"size={request['disk']},nr_inodes={_MOST_FILES},mode=0777")
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
        has = os.statvfs(place).f_flag
        kept = sum(flag for of_statvfs, flag in _KEPT_FLAGS if has & of_statvfs)
        if not place.startswith("/dev/"):
            kept |= _NODEV
        _mount(libc, place, target, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | kept)  # a device is written to all the same
    _must(libc.syscall(seccomp.seccomp_syscall_resolve_name(b"pivot_root"), os.fsencode(new), os.fsencode(old)), "pivot_root")
    os.chdir("/")
    _must(libc.umount2(b"/old", _DETACH), "umount")
    os.rmdir("/old")
    _mount(libc, None, "/", None, _REMOUNT | _RDONLY | _NOSUID | _NODEV)  # else an ordinary user owns, and could fill it
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


class _Comparison(ctypes.Structure):
    """``struct scmp_arg_cmp`` of libseccomp."""

    _fields_ = (("number", ctypes.c_uint), ("operator", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def _filter_system_calls(seccomp: Any) -> None:
    """Refuse `_REFUSED`, other sockets and new namespaces, for good.

    It holds for this process and all its children.
    """
    seccomp.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(_ALLOW)))  # calls of another architecture end the program

    def refuse(name: str | int, *comparisons: tuple[int, int, int, int], error: int = _EPERM) -> None:
        number = seccomp.seccomp_syscall_resolve_name(name.encode()) if isinstance(name, str) else name
        if number == -1:
            raise OSError(f"libseccomp is too old: it does not know the system call {name}")
        given = (_Comparison * max(1, len(comparisons)))(*(_Comparison(*each) for each in comparisons))
        result = seccomp.seccomp_rule_add_array(rules, ctypes.c_uint32(_ERRNO | error), number, len(comparisons), given)
        if result != 0:
            raise OSError(-result, f"libseccomp: {name}: {os.strerror(-result)}")

    for name in _REFUSED:
        refuse(name)
    for name in ("socket", "socketpair"):
        for family in range(1 + max(_FAMILIES)):
            if family not in _FAMILIES:
                refuse(name, (0, _EQ, family, 0))
        refuse(name, (0, _GE, 1 + max(_FAMILIES), 0))
    for flag in _NAMESPACES:
        refuse("clone", (0, _MASKED_EQ, flag, flag))
    refuse("clone3", error=_ENOSYS)  # its flags lie in memory; the C library then calls clone
    refuse("prlimit64", (0, _GE, 1, 0))  # limits of another process
    for name in (*_ATTRIBUTES, _SETXATTRAT):
        refuse(name, error=_ENOTSUP)
    for command in _LOCKS:
        refuse("fcntl", (1, _MASKED_EQ, _INT, command), error=_ENOLCK)
    refuse("fcntl", (1, _MASKED_EQ, _INT, _F_SETPIPE_SZ))
    for option in (_SO_SNDBUF, _SO_SNDBUFFORCE):
        refuse("setsockopt", (1, _MASKED_EQ, _INT, _SOL_SOCKET), (2, _MASKED_EQ, _INT, option))
    refuse("mmap", (3, _MASKED_EQ, _MAP_HUGETLB, _MAP_HUGETLB))
    result = seccomp.seccomp_load(rules)
    if result != 0:
        raise OSError(-result, f"seccomp: {os.strerror(-result)}")
    seccomp.seccomp_release(rules)


def set_limits(limits: dict[str, int]) -> None:
    """Set resource limits for this process and its children."""
    for name, value in limits.items():
        kind = getattr(resource, "RLIMIT_" + name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))

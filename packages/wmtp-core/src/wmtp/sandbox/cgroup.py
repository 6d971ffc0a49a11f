"""Control groups (cgroup v2), which bound a sandbox as a whole.

They bound its memory and processes, where this process may make groups.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["Cgroup", "find_parent"]

_NUMBERS: Final = itertools.count()
_PREFIX: Final = "wmtp-sandbox-"
_REMOVAL_SECONDS: Final = 5.0


class Cgroup:
    """A new, empty group below ``parent``.

    Args:
        parent: a folder of a cgroup2 mount; see `find_parent`.
        limits: file → what is written to it: ``{"pids.max": 8}``. A file of swap may be missing.
    """

    def __init__(self, parent: Path, limits: Mapping[str, int]) -> None:
        self.folder = parent / f"{_PREFIX}{os.getpid()}-{next(_NUMBERS)}"
        self.folder.mkdir()
        try:
            for name, value in limits.items():
                if name != "memory.swap.max" or (self.folder / name).exists():
                    (self.folder / name).write_text(str(value))
        except OSError:
            self.end()
            raise

    def end(self) -> None:
        """Kill every process in it, and remove it."""
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while True:
            try:
                with contextlib.suppress(FileNotFoundError):  # before Linux 5.14 there is no such file
                    (self.folder / "cgroup.kill").write_text("1")
                self.folder.rmdir()
            except OSError:  # busy until the last of them has gone
                if not self.folder.exists() or time.monotonic() > deadline:
                    return
                time.sleep(0.005)
            else:
                return


def find_parent(limits: Mapping[str, int], proc: Path = Path("/proc/self")) -> Path | None:
    """Find a folder where a group with these limits can be made.

    It is the group of this process, or the one above it. Groups of this kind that a killed process left there are removed.

    Returns:
        the folder; None where there is none. Whether it is one is tried.
    """
    try:
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
        own = next(line[3:] for line in (proc / "cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    for fields in mounts:
        if fields[fields.index("-") + 1] != "cgroup2":
            continue
        mount = Path(fields[4])
        group = mount / os.path.relpath(own, fields[3])
        for parent in (group, group.parent):
            if parent.resolve().is_relative_to(mount) and _can_hold(parent.resolve(), limits):
                return parent.resolve()
    return None


def _can_hold(parent: Path, limits: Mapping[str, int]) -> bool:
    try:
        for left in parent.glob(f"{_PREFIX}*"):
            if not Path(f"/proc/{left.name.removeprefix(_PREFIX).partition('-')[0]}").exists():
                left.rmdir()
        group = Cgroup(parent, limits)
    except OSError:
        return False
    group.end()
    return os.access(parent / "cgroup.procs", os.W_OK)

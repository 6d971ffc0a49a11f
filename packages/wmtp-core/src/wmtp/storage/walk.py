"""Files of a folder, links among them."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import Final

from wmtp.errors import InputError

__all__ = ["files_below", "is_hidden", "not_there", "require_target", "special_kind"]

_SPECIAL: Final = {stat.S_ISFIFO: "named pipe", stat.S_ISSOCK: "socket", stat.S_ISCHR: "device", stat.S_ISBLK: "device"}


def files_below(folder: Path, *, skipped: Collection[str] = ()) -> Iterator[Path]:
    """Yield the files below a folder.

    Links are followed, and each folder is read once. A link whose target is missing is yielded too, see `require_target`.

    Args:
        folder: where to look.
        skipped: names of folders that are left out.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name not in skipped)
        yield from (Path(place, name) for name in sorted(files))


def special_kind(path: Path) -> str | None:
    """Name what is neither file nor folder: a pipe, a device.

    None for a file, a folder, and for what is not there.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    found = (name for test, name in _SPECIAL.items() if test(mode))
    return next(found, None)


def not_there(path: Path) -> str:
    """Say why nothing can be read at a path."""
    if (kind := special_kind(path)) is None:
        return f"{path}: no such file or folder"
    return f"{path}: is a {kind}, which is read once at most; write what it gives into a file, and name that"


def is_hidden(path: PurePath) -> bool:
    """Tell whether a part of a relative path begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def require_target(file: Path) -> None:
    """Refuse a link to a file that is missing.

    Raises:
        InputError: naming both.
    """
    if file.is_symlink() and not file.exists():
        raise InputError("uri", f"{file}: is a link to {os.readlink(file)}, which is not there; fetch that, or remove the link")

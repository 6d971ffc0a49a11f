"""Files of a folder, links among them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath

from wmtp.errors import InputError

__all__ = ["files_below", "is_hidden", "require_target"]


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

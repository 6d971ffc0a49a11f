"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wmtp.errors import WMTPError
from wmtp.json_files import writing

__all__ = ["making_folder", "partial_path", "remove_partial", "replace_path", "replace_text", "write_folder"]

_PARTIAL = re.compile(r"\..+\.partial-\d+")
_FULL_DISK = 2**20  # bytes free


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Make a folder that appears whole or not at all; see `making_folder`.

    Args:
        target: the folder.
        write: fills an empty folder.
    """
    with making_folder(target) as new:
        write(new)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written.

    Raises:
        WMTPError: it cannot be written; the message names it.
    """
    draft = partial_path(path)
    with writing(path):
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise


@contextmanager
def making_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder, to appear as ``target`` once filled.

    At the end it is flushed to the disk and renamed to ``target``: that is whole, or not there.

    Args:
        target: the folder; one that is there already is replaced once the new one is whole.

    Raises:
        WMTPError: it could not be written. Nothing of it is left, and what stood at ``target`` still does.
    """
    staging = partial_path(target)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        new = staging / "new"
        new.mkdir(parents=True)
        yield new
        for path in (*new.rglob("*"), new):
            if path.is_file():  # safetensors makes files without read rights for others
                path.chmod(0o666 & ~_umask())
            _flush(path)
        replace_path(new, target, staging / "old")
        _flush(target.parent)
    except Exception as error:
        if isinstance(error, WMTPError):
            raise
        # torch and safetensors say of a full disk only that they wrote less than they wanted to
        full = staging.exists() and shutil.disk_usage(staging).free < _FULL_DISK
        raise WMTPError(
            f"{target} could not be written: {'the disk is full' if full else error}; nothing half-written is left"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def partial_path(target: Path) -> Path:
    """Return this process's hidden name beside ``target``.

    What is there is not whole yet, or put aside to be removed.
    """
    return target.parent / f".{target.name}.partial-{os.getpid()}"


def replace_path(new: Path, target: Path, aside: Path) -> None:
    """Put ``new`` in the place of ``target``.

    A folder in the way is put ``aside``: between two renames there is none.
    """
    if not target.is_dir():
        new.replace(target)
        return
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left half-written in ``folder``.

    Only for the owner of the run's lock.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    """Return the umask of new files.

    It can only be read by setting it.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Have the operating system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

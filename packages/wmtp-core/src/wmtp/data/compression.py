"""Opening of compressed files, within bounded memory."""

from __future__ import annotations

import importlib
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from wmtp.errors import FileError, WMTPError
from wmtp.sizes import format_bytes

__all__ = [
    "COMPRESSIONS",
    "MAX_LINE",
    "TOO_LONG",
    "is_compressed",
    "lines",
    "open_binary",
    "read_whole",
    "readable",
    "uncompressed_name",
]

COMPRESSIONS: Final = (".gz", ".bz2", ".xz", ".zst")
#: a line beyond this is no record: a small compressed file can hold one that fills the memory
MAX_LINE: Final = 128_000_000
TOO_LONG: Final = f"longer than {format_bytes(MAX_LINE)}, which is no record; is every record on a line of its own?"
#: of a file that is read at once
MAX_WHOLE: Final = 1_000_000_000
_PART: Final = 1 << 24
#: the first is in Python since 3.14. (The package zstandard takes a file that was cut off for a whole one.)
_ZSTD: Final = ("compression.zstd", "backports.zstd")


def uncompressed_name(path: Path) -> str:
    """Return the file's name without its compression suffix."""
    return path.stem if is_compressed(path) else path.name


def is_compressed(path: Path) -> bool:
    """Tell whether the file's name has a compression suffix."""
    return path.suffix.lower() in COMPRESSIONS


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed as its suffix says.

    Raises:
        WMTPError: ``.zst``, and no module to read it is installed.
    """
    match path.suffix.lower():
        case ".gz":
            import gzip

            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".bz2":
            import bz2

            return cast(BinaryIO, bz2.open(path, "rb"))
        case ".xz":
            return cast(BinaryIO, lzma.open(path, "rb"))
        case ".zst":
            zstd = _zstd(path)
            # as written by `zstd --long=31`; the module's own limit is 27
            return cast(BinaryIO, zstd.open(path, "rb", options={zstd.DecompressionParameter.window_log_max: 31}))
        case _:
            return path.open("rb")


def _zstd(path: Path) -> Any:
    for name in _ZSTD:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise WMTPError(f"{path}: reading .zst needs a package that is not installed; pip install wmtp-core[zstd]")


def _zstd_errors() -> tuple[type[Exception], ...]:
    return tuple(sys.modules[name].ZstdError for name in _ZSTD if name in sys.modules)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors of reading ``path`` into a `WMTPError` that names it.

    The file may be compressed.
    """
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError, *_zstd_errors()) as error:
        if is_compressed(path) and not isinstance(error, FileNotFoundError | PermissionError):
            raise FileError(f"{path}: damaged or truncated {path.suffix} file ({error}); fetch it again") from error
        raise FileError(f"{path}: cannot be read ({error})") from error


def lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield lines; None in place of one longer than `MAX_LINE`.

    Of such a line, no more than a part is ever in memory.
    """
    while line := file.readline(MAX_LINE + 1):
        if len(line) <= MAX_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_PART)
        yield None


def read_whole(path: Path, *, instead: str) -> bytes:
    """Read a file at once, decompressed.

    Args:
        path: the file.
        instead: what to do with a larger one, for the message.

    Raises:
        WMTPError: it is too large for that.
    """
    parts, length = [], 0
    with open_binary(path) as file:
        while part := file.read(_PART):
            parts.append(part)
            length += len(part)
            if length > MAX_WHOLE:
                raise FileError(f"{path}: holds more than {format_bytes(MAX_WHOLE)}, and would be read at once; {instead}")
    return b"".join(parts)

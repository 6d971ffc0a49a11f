"""Reads data files: JSON lines, JSON and Parquet, compressed or not, one record after another."""

from __future__ import annotations

import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from wmtp.data.base import BadExample, Example
from wmtp.data.fields import type_name
from wmtp.errors import WMTPError

__all__ = [
    "COMPRESSIONS",
    "Record",
    "data_files",
    "given_path",
    "open_binary",
    "parsed",
    "read_records",
    "readable",
    "uncompressed_name",
]

COMPRESSIONS: Final = (".gz", ".bz2", ".xz", ".zst")
FORMATS: Final = (".jsonl", ".json", ".parquet")
_PARQUET_ROWS: Final = 256

#: ``file:line`` and what stands there
Record = tuple[str, Mapping[str, Any]]


def given_path(path: Path | None) -> Path:
    """Return the path of a loader whose config always has a ``uri``."""
    if path is None:
        raise ValueError("this loader reads files, and was given no path")
    return path


def uncompressed_name(path: Path) -> str:
    """Return the file's name without its compression suffix."""
    return path.stem if path.suffix in COMPRESSIONS else path.name


def _format(path: Path) -> str | None:
    suffix = Path(uncompressed_name(path)).suffix
    return suffix if suffix in FORMATS else None


def data_files(path: Path) -> Sequence[Path]:
    """List the data files at ``path``: the file, or those directly inside the folder, sorted.

    Other files in a folder (a README, hidden files) do not count.

    Raises:
        WMTPError: nothing is there, or no data file, or a folder mixes formats.
    """
    if path.is_file():
        if _format(path) is None:
            raise WMTPError(f"{path}: not a data file; {_EXPECTED}")
        return [path]
    if not path.is_dir():
        raise WMTPError(f"{path}: no such file or folder")
    files = sorted(file for file in path.iterdir() if file.is_file() and _format(file) and not file.name.startswith("."))
    if not files:
        raise WMTPError(f"{path}: holds no data file; {_EXPECTED}")
    formats = sorted({str(_format(file)) for file in files})
    if len(formats) > 1:
        raise WMTPError(f"{path}: mixes {' and '.join(formats)} files; name one file, or keep one format in the folder")
    return files


_EXPECTED: Final = f"expected {', '.join(FORMATS)}, as they are or compressed ({', '.join(COMPRESSIONS)})"


def read_records(path: Path) -> Iterator[Record | BadExample]:
    """Yield the records of the data files at ``path``, each with its location.

    A JSON line or a JSON item that is no object is yielded as `BadExample`.

    Raises:
        WMTPError: a file cannot be read as a whole: it is missing, truncated, or not of the format that its name says.
    """
    for file in data_files(path):
        with readable(file):
            match _format(file):
                case ".jsonl":
                    yield from _json_lines(file)
                case ".json":
                    yield from _json(file)
                case _:
                    yield from _parquet(file)


def parsed(path: Path, parse: Callable[[str, Mapping[str, Any]], Iterable[Example]]) -> Iterator[Example | BadExample]:
    """Yield the examples that ``parse`` makes of each record; a `BadExample` it raises is yielded.

    Args:
        path: a data file or a folder of them.
        parse: called with the place of a record and the record.
    """
    for record in read_records(path):
        if isinstance(record, BadExample):
            yield record
            continue
        try:
            yield from parse(*record)
        except BadExample as bad:
            yield bad


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed as its suffix says.

    Raises:
        WMTPError: ``.zst``, and no module to read it is installed.
    """
    match path.suffix:
        case ".gz":
            import gzip

            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".bz2":
            import bz2

            return cast(BinaryIO, bz2.open(path, "rb"))
        case ".xz":
            return cast(BinaryIO, lzma.open(path, "rb"))
        case ".zst":
            return _zstd_open(path)(path, "rb")
        case _:
            return path.open("rb")


def _zstd_open(path: Path) -> Callable[[Path, str], BinaryIO]:
    import importlib

    for name in ("compression.zstd", "backports.zstd"):  # the first is in Python since 3.14
        try:
            return importlib.import_module(name).open
        except ModuleNotFoundError:
            continue
    raise WMTPError(f"{path}: reading .zst needs a package that is not installed; pip install backports.zstd")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors of reading ``path``, which may be compressed, into a `WMTPError` that names it."""
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if path.suffix in COMPRESSIONS and not isinstance(error, FileNotFoundError | PermissionError):
            raise WMTPError(f"{path}: damaged or truncated {path.suffix} file ({error}); fetch it again") from error
        raise WMTPError(f"{path}: cannot be read ({error})") from error


def _json_lines(path: Path) -> Iterator[Record | BadExample]:
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))  # else a cut line's fault is in column 1 of the next
            except UnicodeDecodeError as error:
                yield BadExample(where, f"not valid UTF-8 (byte {error.start + 1} of the line)")
            except json.JSONDecodeError as error:
                yield BadExample(where, f"not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                yield BadExample(where, f"not valid JSON: {error}")
            else:
                yield _record(where, value, escapes=b"\\u" in line)


def _json(path: Path) -> Iterator[Record | BadExample]:
    with open_binary(path) as file:
        content = file.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; one object a line? name it .jsonl" if error.msg == "Extra data" else ""
        raise WMTPError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise WMTPError(f"{path}: not valid JSON: {error}") from error
    items = value.get("data") if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise WMTPError(f'{path}: neither a list of objects nor an object with such a list in "data"')
    for number, item in enumerate(items, start=1):
        yield _record(f"{path}: item {number}", item, escapes=b"\\u" in content)


def _record(where: str, value: Any, *, escapes: bool) -> Record | BadExample:
    if not isinstance(value, dict):
        return BadExample(where, f"not a JSON object but {type_name(value)}")
    try:
        if escapes:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return BadExample(where, "half of a surrogate pair (\\ud800 to \\udfff) stands alone, which no text can hold")
    return where, value


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise WMTPError(f"{path}: reading Parquet needs pyarrow; pip install wmtp-core[parquet]") from error
    try:
        with open_binary(path) as file:
            source = file if path.suffix == ".parquet" else io.BytesIO(file.read())
            number = 0
            for rows in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=_PARQUET_ROWS):
                for record in rows.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except pyarrow.ArrowException as error:
        raise WMTPError(f"{path}: not a readable Parquet file ({error})") from error

"""Reads tables: CSV, Parquet and Arrow files, one row after another."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, Final

from wmtp.data.base import BadExample
from wmtp.data.compression import MAX_LINE, TOO_LONG, is_compressed, lines, open_binary, read_whole
from wmtp.data.fields import Cell, Unreadable
from wmtp.data.splits import format_of
from wmtp.errors import FileError, InputError, WMTPError

__all__ = ["arrow_rows", "csv_rows", "parquet_rows"]

_ROWS: Final = 256
_ARROW_FILE: Final = b"ARROW1"
#: no UTF-8, a field twice in a struct; a date out of range; a time zone that nobody knows
_NO_OBJECT: Final = (ValueError, OverflowError, LookupError)

Row = tuple[str, Mapping[str, Any]]


def csv_rows(path: Path) -> Iterator[Row | BadExample]:
    """Read a CSV file, or a ``.tsv`` one, with a header.

    A row is named by the line where it begins.

    Raises:
        InputError: it has no header, or a column twice.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    with open_binary(path) as file:
        reader = csv.reader(_texts(path, file), delimiter="\t" if format_of(path) == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        line = 1
        while True:
            where, row = f"{path}:{line}", None
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if header is None or "end of data" in str(error):
                    raise InputError("uri", f"{where}: not valid CSV from here on: {error}") from error
                yield BadExample(where, f"not valid CSV: {error}")
            finally:
                line = reader.line_num + 1
            if not row:
                continue
            if header is None:
                header = _header(where, row)
            else:
                yield _csv_row(where, header, row)
        if header is None:
            raise InputError("uri", f"{path}: is empty; its first line must name the columns")


def _texts(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(lines(file), start=1):
        if line is None:
            raise InputError("uri", f"{path}:{number}: {TOO_LONG}")
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")


def _header(where: str, row: Sequence[str]) -> list[str]:
    names = [name.strip() for name in row]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):  # what has no name is not read
        raise InputError("uri", f"{where}: names the column {twice[0]!r} twice; its first line must name the columns")
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)) is not None:
        raise InputError(
            "uri",
            f"{where}: has one column, {names[0]!r}: its cells are separated by {other!r}; write commas (tabs in a .tsv file)",
        )
    return names


def _csv_row(where: str, header: Sequence[str], row: Sequence[str]) -> Row | BadExample:
    if len(row) != len(header):
        return BadExample(where, f"has {len(row)} cells, and there are {len(header)} columns ({', '.join(header)})")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return BadExample(where, "not valid UTF-8")
    return where, dict(zip(header, map(Cell, row), strict=True))


def parquet_rows(path: Path) -> Iterator[Row]:
    """Read a Parquet file."""
    pyarrow = _pyarrow(path, "Parquet")
    try:
        with open_binary(path) as file:
            source = io.BytesIO(read_whole(path, instead="decompress it")) if is_compressed(path) else file
            yield from _rows(path, pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=_ROWS))
    except pyarrow.ArrowException as error:
        raise FileError(f"{path}: not a readable Parquet file ({error})") from error


def arrow_rows(path: Path) -> Iterator[Row]:
    """Read an Arrow file, of either form.

    One has an index, the other is a stream, as the package datasets writes it.
    """
    pyarrow = _pyarrow(path, "Arrow")
    try:
        with open_binary(path) as file:
            has_index = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        if not has_index:
            with open_binary(path) as file:
                source = _Watched(file)
                with pyarrow.ipc.open_stream(source) as reader:
                    yield from _rows(path, _slices(reader))
                has_more = not source.met_end and bool(file.read(1))
            if has_more:
                raise FileError(
                    f"{path}: holds more behind the end of its stream, as files that were joined do; keep them apart"
                )
            if source.met_end:
                raise FileError(
                    f"{path}: has no end-of-stream marker: it was cut off, or whoever wrote it did not close it; "
                    f"fetch or write it again"
                )
        elif is_compressed(path):
            source = io.BytesIO(read_whole(path, instead="decompress it"))
            yield from _rows(path, _slices(_batches(pyarrow.ipc.open_file(source))))
        else:
            with pyarrow.memory_map(str(path)) as source:
                yield from _rows(path, _slices(_batches(pyarrow.ipc.open_file(source))))
    except pyarrow.ArrowException as error:
        raise FileError(f"{path}: not a readable Arrow file ({error})") from error


class _Watched:
    """File that notes whether more was read than it has.

    An Arrow stream says itself where it ends.

    Args:
        file: open for reading.
    """

    closed = False  # pyarrow asks

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.met_end = False

    def read(self, size: int = -1) -> bytes:
        """Read as the file does."""
        content = self._file.read(size)
        self.met_end |= len(content) < size
        return content


def _pyarrow(path: Path, what: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise WMTPError(f"{path}: reading {what} needs pyarrow; pip install wmtp-core[parquet]") from error
    return pyarrow


def _batches(reader: Any) -> Iterator[Any]:
    return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _slices(batches: Any) -> Iterator[Any]:
    """Cut batches of any size into small ones.

    Rows are Python objects, many times as large.
    """
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS)


def _rows(path: Path, batches: Any) -> Iterator[Row]:
    number = 0
    for rows in batches:
        names = rows.schema.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError("uri", f"{path}: has the column {twice[0]!r} twice; leave one out")
        for record in _records(rows):
            number += 1
            yield f"{path}: row {number}", {name: _present(value) for name, value in record.items()}


def _records(rows: Any) -> Sequence[Mapping[str, Any]]:
    """Make Python objects of rows.

    Where some value has none, this is done value by value, and that one is `Unreadable`.
    """
    try:
        return rows.to_pylist()
    except _NO_OBJECT:
        columns = [[_value(value) for value in column] for column in rows.columns]
        return [dict(zip(rows.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _value(value: Any) -> Any:
    try:
        return value.as_py()
    except _NO_OBJECT:
        return Unreadable()


def _present(value: Any) -> Any:
    """Return None for NaN, the empty cell of a numeric table.

    A decimal number becomes a float.
    """
    if isinstance(value, Decimal):
        value = float(value)
    return None if isinstance(value, float) and math.isnan(value) else value

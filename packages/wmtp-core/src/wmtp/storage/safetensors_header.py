"""Header of a safetensors file: names, types and shapes of its tensors.

Imports no torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO, Final

from attrs import frozen

from wmtp.errors import FileError
from wmtp.json_files import DAMAGE

__all__ = ["LENGTH_BYTES", "Entry", "parse_header", "read_header"]

#: of the number that a file begins with: how long its header is
LENGTH_BYTES: Final = 8


@frozen
class Entry:
    """A tensor of a file.

    Args:
        dtype: safetensors' name of its type.
        shape: its shape.
        begin: of its bytes in the file.
        end: likewise, behind the last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(stream: BinaryIO) -> dict[str, Entry]:
    """Read the header at the beginning of an open file (https://huggingface.co/docs/safetensors).

    Raises:
        OSError, or one of `wmtp.json_files.DAMAGE`: it is damaged, or the file is shorter or longer than it says.
    """
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    if not 0 < length <= size - LENGTH_BYTES:
        raise ValueError("its header is longer than the file")
    header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise TypeError("its header is no JSON object")
    start = LENGTH_BYTES + length
    entries: dict[str, Entry] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            entries[name] = Entry(str(entry["dtype"]), tuple(entry["shape"]), start + begin, start + end)
    whole = max((entry.end for entry in entries.values()), default=start)
    if whole != size:
        raise ValueError(f"it has {size:,} bytes in place of {whole:,}")
    return entries


def read_header(file: Path) -> dict[str, Entry]:
    """Read a file's header.

    Raises:
        FileError: it is no whole safetensors file.
    """
    try:
        with file.open("rb") as stream:
            return parse_header(stream)
    except (OSError, *DAMAGE) as error:
        raise FileError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error

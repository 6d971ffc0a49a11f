"""Header of a GGUF file: its metadata, and names of its tensors.

Imports neither torch nor gguf, and reads no weights.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from attrs import define, frozen

from wmtp.errors import FileError

__all__ = ["GgufHeader", "lost_layers", "read_gguf_header"]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
#: type of a value → its form for `struct`
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_LENGTH: Final = struct.Struct("<Q")


@frozen
class GgufHeader:
    """Metadata and tensors of a file.

    Args:
        fields: values by key; of arrays None.
        tensors: names.
    """

    fields: dict[str, Any]
    tensors: Sequence[str]

    def mtp_tensors(self) -> list[str]:
        """Name the tensors of layers for multi-token prediction.

        They are numbered behind the decoder layers, or called ``nextn``.
        """
        kind = self.fields.get("general.architecture")
        count, further = (self.fields.get(f"{kind}.{key}", 0) for key in ("block_count", "nextn_predict_layers"))
        layers = count - further if isinstance(count, int) and isinstance(further, int) and count else math.inf
        numbers = {name: found for name in self.tensors if (found := re.match(r"blk\.(\d+)\.", name))}
        behind = {name for name, found in numbers.items() if int(found[1]) >= layers}
        return [name for name in self.tensors if name in behind or "nextn" in name.split(".")]


def lost_layers(file: Path) -> str | None:
    """Describe layers for multi-token prediction that transformers leaves out.

    Nothing could write them back. None where there are none.

    Raises:
        FileError: the file is damaged.
    """
    header = read_gguf_header(file)
    if header is None or not (lost := header.mtp_tensors()):
        return None
    return (
        f"{file}: transformers leaves out its layers for multi-token prediction ({', '.join(lost)}); use its folder of "
        "safetensors, which keeps them"
    )


def read_gguf_header(file: Path) -> GgufHeader | None:
    """Read a file's header (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    None for a version whose form is not known here.

    Raises:
        FileError: it is no GGUF file, or cut off within its header.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] != _MAGIC:
                raise ValueError("it begins otherwise")
            reader = _Reader(content)
            if reader.number("I") not in _VERSIONS:
                return None
            tensors, count = reader.number("Q"), reader.number("Q")
            fields = {reader.text(): reader.value(reader.number("I")) for _ in range(count)}
            return GgufHeader(fields, [reader.tensor() for _ in range(tensors)])
    except struct.error as error:
        raise FileError(f"{file}: not a whole GGUF file (it is cut off); fetch it again") from error
    except (OSError, ValueError, LookupError) as error:
        raise FileError(f"{file}: not a whole GGUF file ({error}); fetch it again") from error


@define
class _Reader:
    """Reads values one after another.

    Args:
        content: of the file.
        place: of the next value.
    """

    content: mmap.mmap
    place: int = len(_MAGIC)

    def number(self, form: str) -> Any:
        (found,) = struct.unpack_from(f"<{form}", self.content, self.place)
        self.place += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        length = self.number("Q")
        self.skip(length)
        return self.content[self.place - length : self.place].decode("utf-8", "replace")

    def skip(self, length: int) -> None:
        self.place += length
        if self.place > len(self.content):
            raise ValueError("it is cut off")

    def value(self, kind: int) -> Any:
        """Read a value; pass over an array."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:  # a vocabulary has hundreds of thousands
            content, place = self.content, self.place
            for _ in range(count):
                place += _LENGTH.size + _LENGTH.unpack_from(content, place)[0]
            self.skip(place - self.place)
        elif inner == _ARRAY:
            for _ in range(count):
                self.value(inner)
        else:
            self.skip(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
        return None

    def tensor(self) -> str:
        """Read a tensor's name; pass over its shape, type and place."""
        name = self.text()
        self.skip(8 * self.number("I") + 4 + 8)
        return name

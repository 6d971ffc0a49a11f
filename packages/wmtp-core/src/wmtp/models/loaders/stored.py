"""Tensors in files, found by header and copied byte by byte.

They are not held in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from wmtp.errors import FileError
from wmtp.json_files import DAMAGE
from wmtp.models.loaders.files import read_bin
from wmtp.storage.safetensors_header import LENGTH_BYTES, parse_header

__all__ = ["StoredTensor", "dtype_of", "in_memory", "read_stored", "stored_tensors", "write_stored"]

_CHUNK = 2**24
#: safetensors' name of a type that a ``.bin`` file may hold
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@frozen(kw_only=True, eq=False)
class StoredTensor:
    """A tensor as it lies in a file.

    Args:
        dtype: safetensors' name of its type.
        shape: its shape.
        size: in bytes.
        read: yields its bytes, part by part. The file stays open, so that it can be read even after its folder was removed.
        file: the file's name; empty for a tensor in memory.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], Iterator[bytes]]
    file: str = ""


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Find the tensors in safetensors or ``.bin`` files by name.

    Their numbers are not read.

    Raises:
        WMTPError: a file is damaged, or holds more than tensors.
    """
    found: dict[str, StoredTensor] = {}
    places: dict[str, Path] = {}
    for file in files:
        tensors = _in_safetensors(file) if file.suffix == ".safetensors" else _in_bin(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise FileError(f"{file}: {', '.join(twice)} is in {places[twice[0]].name} too; fetch the model again")
        found |= tensors
        places |= dict.fromkeys(tensors, file)
    return found


def read_stored(stored: StoredTensor) -> Tensor:
    """Read a tensor's numbers.

    Raises:
        WMTPError: its file has changed since it was opened.
    """
    try:
        content = bytearray().join(stored.read())
    except OSError as error:
        raise FileError(str(error)) from error
    dtype = dtype_of(stored.dtype)
    if dtype is None:
        raise FileError(f"a tensor of type {stored.dtype} cannot be read")
    return torch.frombuffer(content, dtype=dtype).view(stored.shape) if content else torch.empty(stored.shape, dtype=dtype)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return torch's dtype by its safetensors name; None if unknown."""
    return next((dtype for dtype, known in _TYPES.items() if known == name), None)


def in_memory(tensor: Tensor, dtype: torch.dtype | None = None) -> StoredTensor:
    """Wrap a tensor that is in no file yet.

    It is moved and converted when it is written.

    Args:
        tensor: on any device.
        dtype: to convert it to; None keeps its own.
    """
    own, dtype = tensor.detach(), dtype or tensor.dtype
    size = own.numel() * dtype.itemsize
    return StoredTensor(dtype=_TYPES[dtype], shape=tuple(own.shape), size=size, read=partial(_parts_as, own, dtype))


def write_stored(file: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file from the bytes of stored tensors.

    Raises:
        OSError: it could not be written in full, or a file that is read from has changed.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # wide types first, as safetensors itself does: every tensor then lies at a multiple of its width
    ordered = sorted(tensors.items(), key=lambda item: (-_width(item[1]), item[0]))
    for name, tensor in ordered:
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for name, tensor in ordered:
            written = sum(out.write(part) for part in tensor.read())
            if written != tensor.size:
                raise OSError(f"{name}: {written} bytes could be read in place of {tensor.size}; its file has changed")


def _width(tensor: StoredTensor) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    return tensor.size // count if count else 0


class _OpenFile:
    """A file that stays open, and must not be written to meanwhile."""

    def __init__(self, path: Path, state: tuple[int, int] | None = None) -> None:
        self.source = path.open("rb")
        self._path = path.absolute()
        self._state = self._now() if state is None else state

    def __reduce__(self) -> tuple[type[_OpenFile], tuple[Path, tuple[int, int]]]:
        return _OpenFile, (self._path, self._state)

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self.source.fileno())
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """Raise OSError if the file has changed since it was opened."""
        if self._now() != self._state:
            raise OSError(f"{self._path} was written to since it was opened")


def _in_safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        opened = _OpenFile(file)
        entries = parse_header(opened.source)
    except (OSError, *DAMAGE) as error:
        raise FileError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error
    return {
        name: StoredTensor(
            dtype=entry.dtype,
            shape=entry.shape,
            size=entry.end - entry.begin,
            read=partial(_read_part, opened, entry.begin, entry.end - entry.begin),
            file=file.name,
        )
        for name, entry in entries.items()
    }


def _read_part(opened: _OpenFile, offset: int, size: int) -> Iterator[bytes]:
    opened.check()
    while size > 0:
        part = os.pread(opened.source.fileno(), min(_CHUNK, size), offset)
        if not part:
            return
        yield part
        offset, size = offset + len(part), size - len(part)


def _in_bin(file: Path) -> dict[str, StoredTensor]:
    opened = _OpenFile(file)
    tensors = {}
    for name, tensor in read_bin(file).items():
        if tensor.dtype not in _TYPES:
            raise FileError(f"{file}: {name} is of type {tensor.dtype}, which no safetensors file can hold")
        size = tensor.numel() * tensor.element_size()
        read = partial(_bytes_of, opened, tensor.detach())
        tensors[name] = StoredTensor(
            dtype=_TYPES[tensor.dtype], shape=tuple(tensor.shape), size=size, read=read, file=file.name
        )
    return tensors


def _bytes_of(opened: _OpenFile, tensor: Tensor) -> Iterator[bytes]:
    opened.check()  # the tensor is mapped: it is whatever the file is now
    yield from _parts_of(tensor)


def _parts_as(tensor: Tensor, dtype: torch.dtype) -> Iterator[bytes]:
    yield from _parts_of(tensor.to(device="cpu", dtype=dtype))


def _parts_of(tensor: Tensor) -> Iterator[bytes]:
    if tensor.numel():
        flat = tensor.contiguous().flatten().view(torch.uint8)
        for begin in range(0, flat.numel(), _CHUNK):
            yield flat[begin : begin + _CHUNK].numpy().tobytes()

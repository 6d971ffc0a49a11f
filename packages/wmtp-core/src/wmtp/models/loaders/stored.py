"""Tensors in files: found by their headers, and copied byte by byte without being held in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import torch
from attrs import frozen
from torch import Tensor

from wmtp.errors import WMTPError
from wmtp.models.loaders.files import read_bin

__all__ = ["StoredTensor", "stored_tensors", "write_stored"]

_CHUNK = 2**24
_LENGTH = 8  # bytes of the number that a safetensors file begins with: how long its header is
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
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], Iterator[bytes]]


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Find the tensors in safetensors or ``.bin`` files by name, without reading their numbers.

    Raises:
        WMTPError: a file is damaged, or holds more than tensors.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= _in_safetensors(file) if file.suffix == ".safetensors" else _in_bin(file)
    return found


def write_stored(file: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file with the same bytes as where the tensors lie.

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
    text += b" " * (-len(text) % _LENGTH)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(_LENGTH, "little") + text)
        for name, tensor in ordered:
            written = sum(out.write(part) for part in tensor.read())
            if written != tensor.size:
                raise OSError(f"{name}: {written} bytes could be read in place of {tensor.size}; its file has changed")


def _width(tensor: StoredTensor) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    return tensor.size // count if count else 0


def _in_safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        source = file.open("rb")
        start = _LENGTH + int.from_bytes(source.read(_LENGTH), "little")
        header = json.loads(source.read(start - _LENGTH))
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                read = partial(_read_part, source, _state(source), start + begin, end - begin)
                shape = tuple(entry["shape"])
                tensors[name] = StoredTensor(dtype=entry["dtype"], shape=shape, size=end - begin, read=read)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise WMTPError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error
    return tensors


def _state(source: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(source.fileno())
    return found.st_size, found.st_mtime_ns


def _read_part(source: IO[bytes], opened: tuple[int, int], offset: int, size: int) -> Iterator[bytes]:
    if _state(source) != opened:
        raise OSError(f"{source.name} was written to since it was opened")
    while size > 0:
        part = os.pread(source.fileno(), min(_CHUNK, size), offset)
        if not part:
            return
        yield part
        offset, size = offset + len(part), size - len(part)


def _in_bin(file: Path) -> dict[str, StoredTensor]:
    tensors = {}
    for name, tensor in read_bin(file).items():
        if tensor.dtype not in _TYPES:
            raise WMTPError(f"{file}: {name} is of type {tensor.dtype}, which no safetensors file can hold")
        size = tensor.numel() * tensor.element_size()
        read = partial(_bytes_of, tensor.detach())
        tensors[name] = StoredTensor(dtype=_TYPES[tensor.dtype], shape=tuple(tensor.shape), size=size, read=read)
    return tensors


def _bytes_of(tensor: Tensor) -> Iterator[bytes]:
    if tensor.numel():
        flat = tensor.contiguous().flatten().view(torch.uint8)
        for begin in range(0, flat.numel(), _CHUNK):
            yield flat[begin : begin + _CHUNK].numpy().tobytes()

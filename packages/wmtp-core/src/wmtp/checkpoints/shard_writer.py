"""Writer of a rank's safetensors file, one tensor at a time.

torch's own writer keeps a second and, serialized, a third copy of everything it writes, so a run that fits could be killed
for its memory at its first checkpoint. Here a tensor that is not on the CPU is copied when its turn comes, and no other one is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

__all__ = ["ShardWriter"]

#: https://github.com/huggingface/safetensors#format
_DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: the header's length is a multiple of this, so that tensors begin where their elements may
_ALIGNMENT: Final = 8


class ShardWriter(HuggingFaceStorageWriter):
    """Writer of the files that ``HuggingFaceStorageReader`` reads.

    One a rank, with the offsets of its parts in the header.

    Args:
        folder: where the files are written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder = folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of the plan.

        Raises:
            OSError: the disk is full, say.
            TypeError: safetensors has no name for a tensor's dtype.
        """
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        # elements of the largest dtypes first, so that all are aligned
        items = sorted(plan.items, key=lambda item: (-_dtype(item).itemsize, item.index.fqn))
        path = self._folder / f"shard-{plan.storage_data['shard_index']:05}-model-00001-of-00001.safetensors"
        with path.open("wb") as file:
            file.write(_header(items))
            for item in items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor), "a checkpoint's plan has tensors only"
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        done.set_result([WriteResult(index=item.index, size_in_bytes=_size(item), storage_data=None) for item in items])
        return done


def _header(items: list[WriteItem]) -> bytes:
    entries: dict[str, Any] = {}
    offsets: dict[str, Any] = {}
    end = 0
    for item in items:
        assert item.tensor_data is not None, "a checkpoint's plan has tensors only"
        name, chunk = item.index.fqn, item.tensor_data.chunk
        assert name not in entries, "a rank holds one part of each tensor"
        begin, end = end, end + _size(item)
        entries[name] = {"dtype": _DTYPES[_dtype(item)], "shape": list(chunk.sizes), "data_offsets": [begin, end]}
        offsets[name] = {"saved_offsets": list(chunk.offsets)}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None, "a checkpoint's plan has tensors only"
    dtype = item.tensor_data.properties.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"{item.index.fqn}: safetensors cannot hold {dtype}")
    return dtype


def _size(item: WriteItem) -> int:
    assert item.tensor_data is not None, "a checkpoint's plan has tensors only"
    return item.tensor_data.chunk.sizes.numel() * _dtype(item).itemsize


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

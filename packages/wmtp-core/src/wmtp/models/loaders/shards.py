"""Files of a model folder, kept when it is written again.

The tensors in each, and their types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import Factory, frozen
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from wmtp.models.loaders.files import read_json
from wmtp.models.loaders.stored import StoredTensor, dtype_of, in_memory, read_stored, write_stored

__all__ = ["Shards", "find_shards"]

_FLOATS = ("F64", "F32", "F16", "BF16")


@frozen(kw_only=True, eq=False)
class Shards:
    """Names and types of the tensors in a folder, by file.

    Args:
        files: the file of each tensor, as a file of safetensors.
        types: safetensors' name of the type of each tensor.
        sizes: in bytes.
        main: the type of most of its floating-point numbers; None where there are none.
        others: floating-point tensors of other types, in the folder's files.
        metadata: of its index; None where it has none.
        renamed: names in the folder of what transformers saves under newer names, by these.
        tied: names in the folder of copies that transformers does not save, with the name in the model.
    """

    files: Mapping[str, str]
    types: Mapping[str, str]
    sizes: Mapping[str, int]
    main: str | None = None
    others: Mapping[str, StoredTensor] = Factory(dict)
    metadata: Mapping[str, Any] | None = None
    renamed: Mapping[str, str] = Factory(dict)
    tied: Mapping[str, str] = Factory(dict)

    def as_stored(self, name: str, tensor: Tensor, dtype: torch.dtype) -> StoredTensor:
        """Give a tensor its type in the folder, where lossless.

        Args:
            name: in the folder.
            tensor: the model's.
            dtype: the model's type. If it is not the folder's, every tensor keeps the one that it has.
        """
        wanted = dtype_of(self.types.get(name))
        if wanted is None or wanted == tensor.dtype or dtype_of(self.main) != dtype or not tensor.is_floating_point():
            return in_memory(tensor)
        # transformers may have rounded it: if it is still that, the file has all of its digits
        stored = self.others.get(name)
        if stored is not None and torch.equal(read_stored(stored).to(tensor.dtype), tensor.detach().cpu()):
            return stored
        is_exact = torch.equal(tensor.to(wanted).to(tensor.dtype), tensor)
        return in_memory(tensor, wanted if is_exact else None)

    def write(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        """Write tensors into files named as the folder's, with their index.

        Other weights in ``folder`` are removed.

        Args:
            folder: where to.
            tensors: by name. One that the folder does not have goes where what it was made of lies, or into the last file.

        Raises:
            OSError: it could not be written in full, or a file that is read from has changed.
        """
        last = max(self.files.values(), default="model.safetensors")
        weight_map = {name: self.files.get(name) or self.files.get(self.renamed.get(name, ""), last) for name in tensors}
        by_file: dict[str, dict[str, StoredTensor]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(file, {})[name] = tensors[name]
        for file in sorted(by_file):
            draft = folder / f"{file}.partial"  # the model may be mapped from the file that this replaces
            write_stored(draft, by_file[file])
            draft.replace(folder / file)
        for file in folder.glob("model*.safetensors"):
            if file.name not in by_file:
                file.unlink()
        if self.metadata is None and len(by_file) == 1:
            return
        index = {"metadata": self._metadata(tensors), "weight_map": dict(sorted(weight_map.items()))}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _metadata(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
        """Keep the index's metadata, with new totals where sizes changed."""
        sizes = {name: tensor.size for name, tensor in tensors.items()}
        metadata = dict(self.metadata or {})
        if sizes != self.sizes or "total_size" not in metadata:
            metadata["total_size"] = sum(sizes.values())
        return metadata


def find_shards(
    folder: Path, stored: Mapping[str, StoredTensor], *, renamed: Mapping[str, str], tied: Mapping[str, str]
) -> Shards:
    """Describe the files of a folder.

    Args:
        folder: of safetensors or ``.bin`` files.
        stored: its tensors.
        renamed, tied: see `Shards`.
    """
    files = {name: _safetensors_name(tensor.file) for name, tensor in stored.items()}
    bytes_of: dict[str, int] = {}
    for tensor in stored.values():
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.size
    main = max((name for name in bytes_of if name in _FLOATS), key=bytes_of.__getitem__, default=None)
    suffix = {Path(tensor.file).suffix for tensor in stored.values()}
    index = folder / (SAFE_WEIGHTS_INDEX_NAME if suffix == {".safetensors"} else "pytorch_model.bin.index.json")
    is_indexed = index.is_file() and set(files.values()) != {"model.safetensors"}
    metadata = read_json(index).get("metadata") if is_indexed else None
    return Shards(
        files=files,
        types={name: tensor.dtype for name, tensor in stored.items()},
        sizes={name: tensor.size for name, tensor in stored.items()},
        main=main,
        others={name: tensor for name, tensor in stored.items() if tensor.dtype in _FLOATS and tensor.dtype != main},
        metadata=metadata if isinstance(metadata, dict) else ({} if is_indexed else None),
        renamed=renamed,
        tied=tied,
    )


def _safetensors_name(file: str) -> str:
    if file.endswith(".safetensors"):
        return file
    return f"{file.removesuffix('.bin').replace('pytorch_model', 'model')}.safetensors"

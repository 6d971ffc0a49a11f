"""Tensors mapped from a model folder's files.

Each process reads no more of them than it uses.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wmtp.distributed.ranks import Ranks
from wmtp.errors import FileError
from wmtp.models.loaders.files import read_bin, weight_files

__all__ = ["compare_files", "open_tensors", "settle"]

#: numbers of a tensor's begin, middle and end that are compared between machines
_SAMPLE = 16


def open_tensors(folder: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Map the tensors of a folder.

    Args:
        folder: of safetensors or ``.bin`` files.
        names: what the tensors shall be called, with their names in the files.

    Returns:
        the tensors by the first names, with no memory of their own.

    Raises:
        WMTPError: one is missing, or a file is damaged.
    """
    wanted = {own: name for name, own in names.items()}
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            found |= {wanted[own]: tensor for own, tensor in read_bin(file).items() if own in wanted}
            continue
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {wanted[own]: tensors.get_tensor(own) for own in tensors.keys() if own in wanted}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise FileError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error
    if missing := sorted(names.keys() - found.keys()):
        raise FileError(f"{folder}: has no tensor {names[missing[0]]}; its files have changed, or are others than on rank 0")
    return found


def compare_files(tensors: Mapping[str, Tensor], ranks: Ranks, folder: Path) -> None:
    """Check that all machines have the files of rank 0.

    A few numbers of each tensor are compared.

    Args:
        tensors: of this rank, of the same names on all.
        ranks: all of them; every one calls this.
        folder: what messages call the files.

    Raises:
        WMTPError: a machine has others; the message names it, and a tensor.
    """
    if ranks.world_size == ranks.per_machine:
        return
    own = (socket.gethostname(), {name: _digest(tensor) for name, tensor in tensors.items()} if ranks.local_rank == 0 else None)
    (main_host, expected), *others = ranks.objects(own)

    def compare() -> None:
        assert expected is not None, "rank 0 is the first of its machine"
        for rank, (host, found) in enumerate(others, 1):
            differing = sorted(name for name, digest in (found or {}).items() if digest != expected[name])
            if differing:
                raise FileError(
                    f"{folder}: rank {rank} ({host}) has another model there than rank 0 ({main_host}): {differing[0]} and "
                    f"{len(differing) - 1} more tensors differ; fetch it again on that machine"
                )

    ranks.main_only(compare)


def settle(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move a model to its device and type, parameter by parameter.

    They go there as they are in their files, so that the host never holds a converted copy. Those that are no floating-point
    numbers of 16 or 32 bits keep their type.

    Args:
        model: in place.
        device: where it shall be.
        dtype: of its parameters; None: as they are.
    """
    for parameter in model.parameters():
        moved = parameter.data.to(device)
        convert = dtype is not None and moved.dtype in (torch.bfloat16, torch.float16, torch.float32)
        parameter.data = moved.to(dtype) if convert else moved
    model.to(device)


def _digest(tensor: Tensor) -> int:
    flat = tensor.detach().reshape(-1)
    middle = len(flat) // 2
    sample = torch.cat([flat[:_SAMPLE], flat[middle : middle + _SAMPLE], flat[-_SAMPLE:]])
    text = f"{list(tensor.shape)} {tensor.dtype}".encode()
    return zlib.crc32(text + sample.contiguous().view(torch.uint8).numpy().tobytes())

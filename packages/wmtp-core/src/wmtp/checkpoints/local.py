"""Checkpoints on disk: complete or absent, never half.

All ranks write them, and any number of ranks reads them.

``checkpoints/step-N/`` holds safetensors files with the tensors of model and optimizer, each rank's part in one file
(``torch.distributed.checkpoint``; the header of each file says which part of which tensor it holds, so that nothing is
unpickled), ``state.pt`` (everything else: modules of the trainer, random-number generators, the loop's own state; read with
``weights_only=True``) and ``checkpoint.json`` (the step, and the size and checksum of each file). It is written under a hidden
name beside its place, flushed to disk, and renamed; when it is read, what is not as it was written is refused.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from attrs import frozen
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from wmtp.checkpoints.manifest import check_files, hash_files, write_facts
from wmtp.checkpoints.shard_writer import ShardWriter
from wmtp.distributed.ranks import SINGLE_PROCESS, Ranks
from wmtp.errors import FileError, WMTPError
from wmtp.json_files import DAMAGE
from wmtp.models.mtp import MTPModel
from wmtp.storage.atomic import making_folder, partial_path

__all__ = [
    "Checkpoint",
    "best_step",
    "list_checkpoints",
    "load_checkpoint",
    "load_checkpoint_weights",
    "prune_checkpoints",
    "save_checkpoint",
]

_NAME = re.compile(r"step-(\d+)")
#: stands in ``state.pt`` for a tensor of the optimizer that is in a safetensors file
_ELSEWHERE = "tensor elsewhere"


@frozen(kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Args:
        path: its folder.
        step: optimizer steps that were done.
    """

    path: Path
    step: int


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """List the complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [Checkpoint(path=path, step=step) for step, path in sorted(found)]


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    ranks: Ranks = SINGLE_PROCESS,
) -> Checkpoint:
    """Write ``folder/step-N``. All ranks call it.

    Args:
        folder: of all checkpoints, on a file system that all ranks see.
        step: optimizer steps done.
        model: the model with its heads; tied tensors are stored once.
        optimizer: of the model and the trainer's modules.
        state: everything else: tensors, plain values, and lists and dicts of them; the same on every rank.
        ranks: all of them.

    Raises:
        WMTPError: it could not be written; checkpoints that were there before still are.
    """
    tensors = _model_tensors(model)
    skeleton = _take_out(optimizer.state_dict(), "optimizer", tensors)
    target = folder / f"step-{step}"
    with ExitStack() as stack:
        partial = ranks.main_only(lambda: stack.enter_context(making_folder(target)))

        def write_tensors() -> None:
            try:
                with _quiet():
                    dcp.save(
                        tensors, storage_writer=ShardWriter(partial), process_group=ranks.control, no_dist=ranks.world_size == 1
                    )
            except CheckpointException as error:  # no Exception, and it says at length what went wrong on each rank
                raise next(iter(error.failures.values()))[0] from None

        def hash_own() -> dict[str, str]:
            own = f"shard-{ranks.rank + 1:05}-"  # the writer's own naming; rank 0 reads files of any other name
            return hash_files(partial, [path.name for path in partial.iterdir() if path.name.startswith(own)])

        def finish(hashes: Mapping[str, str]) -> None:
            torch.save({**state, "optimizer": skeleton}, partial / "state.pt")
            write_facts(partial, step, hashes)
            stack.close()

        try:
            ranks.collective(write_tensors)
            parts = ranks.objects(ranks.collective(hash_own))
            ranks.main_only(lambda: finish({name: value for part in parts for name, value in part.items()}))
        except Exception as error:
            if ranks.is_main or isinstance(error, WMTPError):
                raise  # there a full disk gets its name, and what was written is removed
            raise FileError(f"{target} could not be written: {error}") from error
    return Checkpoint(path=target, step=step)


def prune_checkpoints(folder: Path, keep_last: int, needed: Collection[int] = ()) -> None:
    """Remove all but the newest ``keep_last`` checkpoints; 0 keeps all.

    Those of the steps ``needed`` stay too.
    """
    if keep_last:
        for checkpoint in list_checkpoints(folder)[:-keep_last]:
            if checkpoint.step in needed:
                continue
            # renamed first, so that a kill in the middle leaves no half checkpoint under its name
            doomed = partial_path(checkpoint.path)
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks = SINGLE_PROCESS
) -> dict[str, Any]:
    """Load tensors into ``model`` and ``optimizer``; return the other state.

    That is on the CPU. Every rank reads its own parts, whoever wrote them. The ranks share the work of comparing the files with
    their checksums, so none may use what it has read before all have.

    Raises:
        WMTPError: a file is missing, damaged or of another model; the message names it.
    """
    from safetensors import SafetensorError

    try:
        check_files(checkpoint.path, ranks.rank, ranks.world_size)
        state = torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True)
        tensors = _model_tensors(model)
        # what the optimizer keeps of each parameter is made as it would make it, sharded or whole, and then filled
        restored = _put_in(state.pop("optimizer"), _after_a_step(optimizer), "optimizer", tensors)
        _read(checkpoint.path, tensors)
        optimizer.load_state_dict(restored)
        return state
    except (OSError, RuntimeError, SafetensorError, *DAMAGE) as error:
        older = [other.path.name for other in list_checkpoints(checkpoint.path.parent) if other.step < checkpoint.step]
        then = f"resume from {older[-1]}" if older else "start over: there is no older one here"
        raise FileError(f"{checkpoint.path} cannot be read: {error}; remove this folder to {then}") from error


def load_checkpoint_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Read the weights alone into ``model``, which may have another precision.

    Raises:
        WMTPError: a file is missing, damaged or of another model; the message names it.
    """
    from safetensors import SafetensorError

    try:
        check_files(checkpoint.path, 0, 1)
        places = _model_tensors(model)
        tensors = {name: torch.empty_like(tensor, dtype=torch.float32) for name, tensor in places.items()}
        _read(checkpoint.path, tensors, only="model.")
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
    except (OSError, RuntimeError, SafetensorError, *DAMAGE) as error:
        raise FileError(f"{checkpoint.path} cannot be read: {error}") from error


def best_step(checkpoint: Checkpoint) -> int | None:
    """Read the best step so far from a checkpoint, if any."""
    state = torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True)
    return state["best"]["step"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning about intended single-process I/O."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List parameters to save and persistent buffers, tied ones once.

    Frozen ones that the base's files hold are left out.
    """
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    state = model.learned_state() if isinstance(model, MTPModel) else model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = tensor.detach()
    return tensors


def _take_out(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Copy nested dicts and lists without tensors, collected in ``tensors`` by path.

    Single numbers stay.
    """
    if isinstance(value, Mapping):
        return {key: _take_out(element, f"{path}.{key}", tensors) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_take_out(element, f"{path}.{index}", tensors) for index, element in enumerate(value)]
    if isinstance(value, Tensor) and value.ndim:
        tensors[path] = value.detach()
        return {_ELSEWHERE: path}
    return value.full_tensor() if isinstance(value, DTensor) else value


def _put_in(skeleton: Any, template: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Reverse `_take_out`: place ``template``'s tensors, and list them in ``tensors``.

    There they are to be filled.
    """
    if isinstance(skeleton, Mapping):
        if skeleton.keys() == {_ELSEWHERE}:
            if not isinstance(template, Tensor):
                raise ValueError(f"the optimizer keeps no {path}")
            tensors[path] = template
            return template
        inner = template if isinstance(template, Mapping) else {}
        return {key: _put_in(element, inner.get(key), f"{path}.{key}", tensors) for key, element in skeleton.items()}
    if isinstance(skeleton, list | tuple):
        inner = template if isinstance(template, list | tuple) else []
        elements = enumerate(skeleton)
        return [_put_in(e, inner[i] if i < len(inner) else None, f"{path}.{i}", tensors) for i, e in elements]
    return skeleton


def _after_a_step(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state dict after a step without effect."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return optimizer.state_dict()


def _read(folder: Path, tensors: dict[str, Tensor], only: str = "") -> None:
    """Fill ``tensors`` from the files, which must match them exactly.

    Every tensor must be there, of the right shape, and nothing else.

    Args:
        folder: of the checkpoint.
        tensors: by name.
        only: how the names begin that are looked at.

    Raises:
        ValueError: it is not so.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    there = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    problems = [f"{name} is missing" for name in tensors if name not in there]
    problems += [f"{name} is unexpected" for name in there if name not in tensors and name.startswith(only)]
    problems += [
        f"{name} has shape {list(there[name])} in place of {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in there and there[name] != tuple(tensor.shape)
    ]
    if problems:
        raise ValueError("; ".join(problems[:5]))
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise ValueError(str(next(iter(error.failures.values()))[0])) from error

"""Checkpoints: complete or absent, never half.

``checkpoints/step-N/`` holds ``model.safetensors`` (the model with all its heads), ``state.pt`` (modules of the trainer,
optimizer, random-number generators, the loop's own state; read with ``weights_only=True``) and ``checkpoint.json`` (the step
and the size of each file). It is written under a hidden name beside its place, flushed to disk, and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import nn

from wmtp.errors import WMTPError

__all__ = [
    "Checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "prune_checkpoints",
    "remove_partial",
    "save_checkpoint",
    "write_folder",
]

FORMAT = 1
_NAME = re.compile(r"step-(\d+)")
_PARTIAL = re.compile(r"\.(.+)\.partial-(\d+)")


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
    """The complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [Checkpoint(path=path, step=step) for step, path in sorted(found)]


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Make a folder that appears whole or not at all.

    Args:
        target: the folder; one that is there already is replaced once the new one is whole.
        write: fills an empty folder.

    Raises:
        WMTPError: it could not be written. Nothing of it is left, and what stood at ``target`` still does.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                _flush(path)
        _flush(partial)
        replaced = target.parent / f".{target.name}.replaced.partial-{os.getpid()}"
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        _flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors and torch raise errors of their own where the disk is full
        if isinstance(error, WMTPError) or not isinstance(error, Exception):
            raise
        free = shutil.disk_usage(target.parent).free
        raise WMTPError(
            f"{target} could not be written: {error} ({free / 2**20:,.0f} MiB are free there); nothing half-written is left"
        ) from error


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``. Only the owner of the run's lock may call this."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(folder: Path, step: int, model: nn.Module, state: Mapping[str, Any]) -> Checkpoint:
    """Write ``folder/step-N``.

    Args:
        folder: of all checkpoints.
        step: optimizer steps done.
        model: the model with its heads; tied tensors are stored once.
        state: everything else: tensors, plain values, and lists and dicts of them.

    Raises:
        WMTPError: it could not be written; checkpoints that were there before still are.
    """
    from safetensors.torch import save_model

    def write(partial: Path) -> None:
        save_model(model, str(partial / "model.safetensors"))
        torch.save(dict(state), partial / "state.pt")
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / "checkpoint.json").write_text(json.dumps({"format": FORMAT, "step": step, "files": sizes}, indent=2) + "\n")

    target = folder / f"step-{step}"
    write_folder(target, write)
    return Checkpoint(path=target, step=step)


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` checkpoints; 0 keeps all."""
    if keep_last:
        for checkpoint in list_checkpoints(folder)[:-keep_last]:
            # renamed first, so that a kill in the middle leaves no half checkpoint under its name
            doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.partial-{os.getpid()}")
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Read the model's tensors into ``model``, and return the rest of the state, on the CPU.

    Raises:
        WMTPError: a file is missing, damaged or of another model; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        facts = json.loads((checkpoint.path / "checkpoint.json").read_text())
        if facts["format"] != FORMAT:
            raise WMTPError(f"{checkpoint.path}: format {facts['format']}, but this version of wmtp reads format {FORMAT}")
        for name, size in facts["files"].items():
            actual = (checkpoint.path / name).stat().st_size
            if actual != size:
                raise WMTPError(f"{checkpoint.path / name}: {actual:,} bytes, but {size:,} were written; the file is damaged")
        load_model(model, str(checkpoint.path / "model.safetensors"), strict=True, device=str(device))
        return torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WMTPError(
            f"{checkpoint.path} cannot be read: {error}; remove this folder to go on from the checkpoint before it"
        ) from error


def _flush(path: Path) -> None:
    """Have the operating system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: complete or absent, never half.

``checkpoints/step-N/`` holds ``model.safetensors`` (the model with all its heads), ``state.pt`` (modules of the trainer,
optimizer, random-number generators, the loop's own state; read with ``weights_only=True``) and ``checkpoint.json`` (the step
and the size of each file). It is written under a hidden name beside its place, flushed to disk, and renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import nn

from wmtp.errors import WMTPError
from wmtp.storage.atomic import partial_path, write_folder

__all__ = [
    "Checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
]

FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


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
            doomed = partial_path(checkpoint.path)
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
                raise ValueError(f"{checkpoint.path / name} has {actual:,} bytes, but {size:,} were written")
        load_model(model, str(checkpoint.path / "model.safetensors"), strict=True, device=str(device))
        return torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise WMTPError(
            f"{checkpoint.path} cannot be read: {error}; remove this folder to go on from the checkpoint before it"
        ) from error

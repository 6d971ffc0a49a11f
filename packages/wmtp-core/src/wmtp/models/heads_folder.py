"""Files of heads 2..H in a model folder.

``mtp_heads.json`` and, unless they are among the model's, their tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.errors import FileError
from wmtp.models.heads import HEAD_KINDS
from wmtp.models.loaders.files import read_json, tensor_shapes
from wmtp.models.tensor_fit import misfits
from wmtp.storage.model_files import HEADS_CONFIG, LAYERS_LIMIT

__all__ = [
    "HEADS_CONFIG",
    "HEADS_WEIGHTS",
    "describe_heads",
    "load_heads",
    "remove_heads",
    "saved_draft_ids",
    "saved_heads",
    "saved_tensors",
    "write_heads",
]

HEADS_WEIGHTS: Final = "mtp_heads.safetensors"
_FORMAT: Final = 1


def write_heads(folder: Path, heads: HeadsConfig, draft_ids: Sequence[int] | None, state: Mapping[str, Tensor]) -> None:
    """Write the heads beside a model.

    Args:
        folder: of the model.
        heads: their kind, number and layout.
        draft_ids: the tokens that they draft from; None: all.
        state: their tensors, by name.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / HEADS_WEIGHTS, metadata={"format": "pt"})
    describe_heads(folder, heads, draft_ids)


def describe_heads(folder: Path, heads: HeadsConfig, draft_ids: Sequence[int] | None) -> None:
    """Write ``mtp_heads.json`` alone; see `write_heads`."""
    description: dict[str, Any] = {"format": _FORMAT, "kind": heads.kind, "horizon": heads.horizon}
    if heads.kind in ("chained", "shared"):
        description["layout"] = heads.layout
    if draft_ids is not None:
        description["draft_vocabulary"] = list(draft_ids)
    (folder / HEADS_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def remove_heads(folder: Path) -> None:
    """Remove the files of another model's heads that was saved here."""
    for name in (HEADS_CONFIG, HEADS_WEIGHTS):
        (folder / name).unlink(missing_ok=True)


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of the heads."""
    return load_file(folder / HEADS_WEIGHTS)


def saved_heads(folder: Path) -> HeadsConfig | None:
    """Read which heads a model folder has; None without any.

    They are checked against the tensors beside it.
    """
    description, weights = folder / HEADS_CONFIG, folder / HEADS_WEIGHTS
    if not description.exists() and not weights.exists():
        return None
    content = read_json(description) if description.exists() else {}
    if content.get("kind") != "native":  # whose tensors are among the model's
        for file in (description, weights):
            if not file.exists():
                raise FileError(f"{file}: not there, but the folder holds the other part of its extra heads")
    if content.get("format") != _FORMAT:
        raise FileError(f"{description}: format {content.get('format')!r} is not known to this version of WMTP")
    kind, horizon = content.get("kind"), content.get("horizon")
    if str(kind) not in HEAD_KINDS or not isinstance(horizon, int) or not 2 <= horizon <= LAYERS_LIMIT:
        raise FileError(f"{description}: kind {kind!r} and horizon {horizon!r} are not those of any heads")
    if kind == "native":
        return HeadsConfig(kind=kind, horizon=horizon)
    tensor_shapes(weights)
    layout = content.get("layout", "plain")  # what heads are whose file names none
    if layout not in ("mimo", "exaone", "plain"):
        raise FileError(f"{description}: layout {layout!r} is not known to this version of WMTP")
    return HeadsConfig(kind=kind, horizon=horizon, layout=layout if kind in ("chained", "shared") else HeadsConfig().layout)


def saved_draft_ids(folder: Path, model: PreTrainedModel) -> tuple[int, ...] | None:
    """Read from ``mtp_heads.json`` which tokens heads 2..H draft from."""
    vocab_size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    description = folder / HEADS_CONFIG
    ids = read_json(description).get("draft_vocabulary") if description.exists() else None
    if ids is None:
        return None
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
        raise FileError(f"{description}: draft_vocabulary holds no ids of this model's {vocab_size} tokens")
    return tuple(ids)


def load_heads(heads: nn.ModuleList, state: Mapping[str, Tensor]) -> None:
    """Put tensors into the heads.

    Args:
        heads: of the model.
        state: their tensors, by name.

    Raises:
        WMTPError: one is missing, is too many, or has another shape.
    """
    if problems := misfits({name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}, state):
        raise FileError("the tensors of the extra heads do not fit the model: " + "; ".join(problems))
    heads.load_state_dict(dict(state))

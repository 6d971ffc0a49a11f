"""Tensors of native layers: from their folder into heads, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy

import torch
from attrs import evolve
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from wmtp.models.loaders.stored import StoredTensor, read_stored
from wmtp.models.native.found import Native

__all__ = ["folder_tensors", "head_tensors", "share_tables"]

_log = logging.getLogger("wmtp")


def share_tables(native: Native, stored: Mapping[str, StoredTensor], model: PreTrainedModel) -> Native:
    """Share the model's embedding and unembedding where the heads' are copies.

    Servers do so whatever the tables are (vLLM 0.32, ``_maybe_share_embeddings``, ``_maybe_share_lm_head``): copies that were
    trained apart would be lost there.

    Args:
        native: without a problem.
        stored: of the folder.
        model: opened from it.
    """
    first = place = native.modules
    parts = {name: own for name, own in native.parts.items() if not name.split(".")[0].isdigit() or name.count(".") > 1}
    copies: dict[str, str] = {}
    kept = {"embedding": False, "unembedding": False}
    for kind, has in (("embedding", native.own_embedding), ("unembedding", native.own_unembedding)):
        if not has:
            continue
        names = [native.parts[f"{first + module}.weight"] for module in range(native.modules)]
        first += native.modules
        table = _table(model, kind)[1]
        if all(torch.equal(read_stored(stored[name]).to(table), table) for name in names):
            copies |= dict.fromkeys(names, kind)
            continue
        _log.warning(
            "the model's own layers for multi-token prediction have another %s than the model; they are trained with it, but "
            "vLLM puts the model's in its place",
            kind,
        )
        kept[kind] = True
        parts |= {f"{place + module}.weight": name for module, name in enumerate(names)}
        place += native.modules
    own = {f"own_{kind}": value for kind, value in kept.items()}
    return evolve(native, parts=parts, copies=copies, **own)


def _table(model: PreTrainedModel, kind: str) -> tuple[str, Tensor]:
    """Name and weight of the model's embedding or unembedding."""
    found = model.get_input_embeddings() if kind == "embedding" else model.get_output_embeddings()
    path = next(path for path, module in model.named_modules() if module is found)
    return f"{path}.weight", model.get_parameter(f"{path}.weight").detach()


def head_tensors(native: Native, stored: Mapping[str, StoredTensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Read the tensors, named as in the heads' state dict.

    Args:
        native: without a problem.
        stored: of the folder.
        model: opened from it; experts and the like are converted as its own are.
    """
    state = {name: read_stored(stored[own]) for name, own in native.parts.items()}
    taken = {*native.parts.values(), *native.copies}
    for module, begin in enumerate(native.layers):
        own = {name: stored[name] for name in native.tensors if name.startswith(begin) and name not in taken}
        named = {native.template + name.removeprefix(begin): read_stored(tensor) for name, tensor in own.items()}
        converted = _converted(model, named)
        path = f"{native.template_path}."
        state |= {f"{module}.layer.{name.removeprefix(path)}": tensor for name, tensor in converted.items()}
    return state


def folder_tensors(
    native: Native, state: Mapping[str, Tensor], model: PreTrainedModel, base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Name and lay out the heads' tensors as their folder does.

    Args:
        native: where they stand.
        state: the state dict of the heads, with whole tensors.
        model: as for `head_tensors`.
        base: its state dict with whole tensors, where this process holds only a part of them.
    """
    tensors: dict[str, Tensor] = {}
    for name, kind in native.copies.items():
        path, table = _table(model, kind)
        tensors[name] = table if base is None else base[path]
    tensors |= {own: state[name] for name, own in native.parts.items() if name in state}
    for module, begin in enumerate(native.layers):
        prefix = f"{module}.layer."
        inside = {
            f"{native.template_path}.{name.removeprefix(prefix)}": tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        written = revert_weight_conversion(model, inside)
        tensors |= {begin + name.removeprefix(native.template): tensor for name, tensor in written.items()}
    return tensors


def _converted(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors of a folder as ``from_pretrained`` does: experts are joined, say."""
    conversions = get_model_conversion_mapping(model)
    renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    steps: dict[str, WeightTransform] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = name, None
        if pattern is None:
            step = steps.setdefault(renamed, WeightRenaming(name, renamed))
        else:
            step = steps.setdefault(renamed, deepcopy(by_pattern[pattern]))
        step.add_tensor(renamed, name, name if pattern is None else pattern, tensor)  # type: ignore[arg-type]
    found: dict[str, Tensor] = {}
    for first, step in steps.items():
        for name, value in step.convert(first, model=model, config=model.config).items():  # type: ignore[attr-defined]
            found[name] = value[0] if isinstance(value, list) else value
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort numbers in names as numbers: expert 10 after expert 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

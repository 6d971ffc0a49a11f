"""Checks of native layers by config and file headers alone.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from attrs import evolve

from wmtp.config.schema import HeadsConfig
from wmtp.errors import WMTPError
from wmtp.json_files import read_json_object
from wmtp.models.native.layouts import LAYOUTS
from wmtp.models.native.search import (
    NONE_FOUND,
    Problem,
    differences,
    expected_tensors,
    is_mtp_name,
    promised_in,
    refusal,
    search_layers,
    search_nothing,
)
from wmtp.storage.model_files import HEADS_CONFIG, check_folder, is_adapter, quantization, shard_files
from wmtp.storage.safetensors_header import Entry, read_header

__all__ = ["native_problems"]

_EXPERT: Final = re.compile(r"\.experts\.(\d+\.)?")
_COMPUTED: Final = "rotary_emb.inv_freq"


def native_problems(folder: Path, heads: HeadsConfig | None) -> Iterator[str]:
    """Report why native layers cannot be the heads that are wanted.

    What the files do not tell without transformers is left to opening: fields that ``config.json`` leaves out, ``.bin`` files.

    Args:
        folder: of the model; of other kinds nothing is said.
        heads: the config's ``[models.base.heads]``; None leaves it to the folder.

    Yields:
        ``kind: what is wrong; what to do``, or without a key.
    """
    if not _may_be_native(folder, heads):
        return
    try:
        check_folder(folder)
        if quantization(folder) is not None:
            return
        content = read_json_object(folder / "config.json")
    except WMTPError:  # said of the folder
        return
    named = heads is not None and heads.kind == "native"
    key = "kind: " if named else ""
    try:
        tensors = _tensors(folder)
        if tensors is None:
            return
        found = _problem(content, tensors)
    except WMTPError as error:
        yield f"{key}{error}"
        return
    if found is None:
        return
    if isinstance(found, Problem):
        alone = "" if heads is not None else "; or write horizon = 1 in [models.base.heads] to train without them"
        yield f"{key}{refusal(found)}{alone}"
    elif named:
        yield f"{key}{NONE_FOUND}"


def _may_be_native(folder: Path, heads: HeadsConfig | None) -> bool:
    if heads is not None and (heads.horizon == 1 or heads.kind not in (None, "native")):
        return False
    if not (folder / "config.json").is_file() or is_adapter(folder):
        return False
    brought = folder / HEADS_CONFIG
    try:
        return not brought.is_file() or read_json_object(brought).get("kind") == "native"
    except WMTPError:  # said when it is opened
        return False


def _tensors(folder: Path) -> Mapping[str, Entry] | None:
    """Read the headers of the files that transformers would open.

    None where they are no safetensors.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        return None
    files = sorted(set(shard_files(index).values()))
    return {name: entry for file in files for name, entry in read_header(folder / file).items()}


def _problem(content: Mapping[str, Any], tensors: Mapping[str, Entry]) -> Problem | bool | None:
    """Compare native layers with the config and the layer they resemble.

    Returns:
        what is wrong; False: there are none of a known layout; None: nothing is wrong, or it is not known.
    """
    table = content.get("text_config")
    text = table if isinstance(table, dict) else content
    layers = text.get("num_hidden_layers")
    stems = [name.removesuffix("embed_tokens.weight") for name in tensors if name.endswith("embed_tokens.weight")]
    # a layer's own embedding is deeper
    stem = min(stems, key=len, default=None)
    if not isinstance(layers, int) or stem is None:
        return None
    embedding = tensors[f"{stem}embed_tokens.weight"].shape
    if len(embedding) != 2:
        return None
    model_type = text.get("model_type") or f"{content.get('model_type')}_text"
    names = {"model_type": str(model_type), "architectures": content.get("architectures") or ()}
    said = promised_in(content) | promised_in(text)
    # transformers leaves out of a config what is its class's default
    promised = {layout.name: said.get(layout.key, layout.unsaid or None) for layout in LAYOUTS}
    search = search_layers(tensors, layers=layers, promised=promised, **names)
    if search is None:
        others = any(is_mtp_name(name, {stem}, layers) for name in tensors)
        return search_nothing(said, others=others, **names) or False
    if search.problem is not None:
        return search.problem
    layout, modules = search.layout, search.modules
    own = {name: tensors[name] for group in modules.values() for name in group if not name.endswith(_COMPUTED)}
    begin = f"{stem}layers.{0 if layout.template == 'first' else layers - 1}."
    template = {
        name.removeprefix(begin): entry.shape
        for name, entry in tensors.items()
        if name.startswith(begin) and not name.endswith(_COMPUTED)
    }
    rows, width = embedding
    expected = expected_tensors(layout, len(modules), layers=layers, template=template, width=width, rows=rows, tensors=own)
    if _forms(own) and _forms(own) != _forms(expected.shapes):
        # experts one by one here, joined there: which of them the model's class reads, transformers alone knows
        own = {name: entry for name, entry in own.items() if _EXPERT.search(name) is None}
        rest = {name: shape for name, shape in expected.shapes.items() if _EXPERT.search(name) is None}
        expected = evolve(expected, shapes=rest)
    return differences(layout, expected, own, text)


def _forms(names: Mapping[str, object]) -> set[bool]:
    """Tell whether experts are stored one by one, joined, or both."""
    return {found[1] is not None for name in names if (found := _EXPERT.search(name))}

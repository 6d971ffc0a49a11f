"""Search for native layers among the tensors of a folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from wmtp.models.config_fields import layer_count
from wmtp.models.loaders.stored import StoredTensor
from wmtp.models.native.found import Native
from wmtp.models.native.layouts import LAYOUTS, Layout
from wmtp.models.native.search import differences, expected_tensors, search_layers, search_nothing

__all__ = ["find_native"]


def find_native(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    said: Mapping[str, int],
    others: bool,
) -> Native | None:
    """Find layers of a known layout.

    Args:
        model: of the folder, on the meta device, which knows how its names are converted.
        config: the folder's.
        tensors: what the folder holds besides the model.
        said: fields of ``config.json`` itself that promise such layers.
        others: the folder has tensors of any layer for multi-token prediction.

    Returns:
        what was found, with a problem where it is damaged; None: nothing that is promised, or nothing of a layout that is known
            for this model.
    """
    text = config.get_text_config(decoder=True)
    layers = layer_count(text)
    known = {"model_type": text.model_type, "architectures": getattr(config, "architectures", None) or ()}
    promised = {layout.name: _promised(layout, text) for layout in LAYOUTS}
    search = search_layers(tensors, layers=layers, promised=promised, **known)
    if search is None:
        nothing = search_nothing(said, others=others, **known)
        return None if nothing is None else Native(problem=nothing)
    if search.problem is not None:
        return Native(layout=search.layout.name, problem=search.problem)
    found = {name: tensors[name] for names in search.modules.values() for name in names}
    return _compared(search.layout, len(search.modules), model, layers, found)


def _promised(layout: Layout, text: PreTrainedConfig) -> int:
    said = getattr(text, layout.key, None)
    return said if isinstance(said, int) and said > 0 else layout.unsaid


def _compared(layout: Layout, modules: int, model: PreTrainedModel, layers: int, tensors: Mapping[str, StoredTensor]) -> Native:
    """Compare the tensors with those that the layout has in this model."""
    path, template = _template(model, layers, layout)
    inside = revert_weight_conversion(model, {f"{path}.{name}": value for name, value in template.state_dict().items()})
    stem = _common_stem(inside, path)
    width, rows = model.get_output_embeddings().weight.shape[::-1]  # type: ignore[union-attr]
    expected = expected_tensors(
        layout,
        modules,
        layers=layers,
        template={name.removeprefix(stem): tuple(value.shape) for name, value in inside.items()},
        width=width,
        rows=rows,
        tensors=tensors,
    )
    own = expected.own
    return Native(
        layout=layout.name,
        modules=modules,
        own_embedding=own["embedding"],
        own_unembedding=own["unembedding"],
        parts={_place(part, modules, own["embedding"]): name for part, name in expected.parts.items()},
        layers=expected.begins,
        template=stem,
        template_path=path,
        tensors=tuple(sorted(tensors)),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        problem=differences(layout, expected, tensors, model.config.get_text_config(decoder=True).to_dict()),
    )


def _place(part: str, modules: int, own_embedding: bool) -> str:
    """Rename ``{module}.embedding.weight`` to its place among the heads.

    Their list has modules, then embeddings, then unembeddings.
    """
    module, name, _ = part.split(".")
    if name == "embedding":
        return f"{modules + int(module)}.weight"
    if name == "unembedding":
        return f"{modules * (1 + own_embedding) + int(module)}.weight"
    return part


def _template(model: PreTrainedModel, layers: int, layout: Layout) -> tuple[str, nn.Module]:
    """Find the decoder layer that a module resembles, and its path."""
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == layers}
    path = min(lists, key=lambda found: found.count("."))
    number = 0 if layout.template == "first" else layers - 1
    return f"{path}.{number}", lists[path][number]


def _common_stem(names: Mapping[str, object], path: str) -> str:
    """Return the prefix of one decoder layer's names in the folder."""
    number = path.rpartition(".")[2]
    stems = {found[0] for name in names if (found := re.match(rf".*?\blayers\.{number}\.", name))}
    return min(stems, default=f"{path}.")

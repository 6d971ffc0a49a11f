"""Finds a model's own layers for multi-token prediction among the tensors of its folder."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from wmtp.models.config_fields import layer_count
from wmtp.models.loaders.stored import StoredTensor
from wmtp.models.native.found import Native
from wmtp.models.native.layouts import LAYOUTS, Layout

__all__ = ["find_native"]

_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 6


def find_native(model: PreTrainedModel, config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]) -> Native | None:
    """Find layers of a known layout.

    Args:
        model: of the folder, on the meta device, which knows how its names are converted.
        config: the folder's.
        tensors: what the folder holds besides the model.

    Returns:
        what was found, with a problem where it is damaged; None: nothing, or nothing of a layout that is known for this model.
    """
    text = config.get_text_config(decoder=True)
    layers = layer_count(text)
    present = {layout.name: found for layout in LAYOUTS if (found := _modules(layout, tensors, layers))}
    mine = [layout for layout in LAYOUTS if layout.name in present and _knows(layout, config, text)]
    if not mine:
        return None
    layout = mine[0]
    # some layouts name their tensors alike
    others = {name: found for name, found in present.items() if name == layout.name or found != present[layout.name]}
    if len(others) > 1:
        both = " and ".join(f"'{name}' ({found[min(found)][0]} …)" for name, found in others.items())
        return Native(layout=layout.name, problem=f"the folder holds layers of several layouts, {both}")
    found = present[layout.name]
    promised = _promised(layout, text)
    if promised != len(found) or set(found) != set(range(len(found))):
        said = f"config.json says {layout.key} = {promised}" if promised else f"config.json does not say {layout.key}"
        return Native(layout=layout.name, problem=f"{said}, and the folder holds {_count(found)} of them")
    if layout.most is not None and promised > layout.most:
        return None
    return _check(layout, len(found), model, layers, {name: tensors[name] for names in found.values() for name in names})


def _knows(layout: Layout, config: PreTrainedConfig, text: PreTrainedConfig) -> bool:
    if text.model_type not in layout.models:
        return False
    # WMTP opens MiMo as the Qwen2 that it is, and what else calls itself so has no such layers
    return layout.name != "mimo" or "MiMoForCausalLM" in (getattr(config, "architectures", None) or ())


def _promised(layout: Layout, text: PreTrainedConfig) -> int:
    said = getattr(text, layout.key, None)
    return said if isinstance(said, int) and said > 0 else layout.unsaid


def _count(found: Mapping[int, list[str]]) -> str:
    return f"{len(found)} (number {', '.join(map(str, sorted(found)))})"


def _modules(layout: Layout, names: Mapping[str, object], layers: int) -> dict[int, list[str]]:
    """Group the names of a layout's tensors by the number of their module."""
    found: dict[int, list[str]] = {}
    for module in range(len(names)):
        stems = [layout.part(part, module, layers) for part in _parts(layout).values()]
        begin = layout.part(layout.layer, module, layers) or ""
        own = [name for name in names if name.startswith(begin) or name.removesuffix(".weight") in stems]
        if not any(name.startswith(begin) for name in own):
            break
        if module and not set(own) - set(found[0]):
            break
        found[module] = own
    return found


def _parts(layout: Layout) -> dict[str, str]:
    """Name the parts of a module, by their names in `ChainedBlock` or that of the table that they are."""
    parts = {
        "embedding_norm": layout.embedding_norm,
        "hidden_norm": layout.hidden_norm,
        "projection": layout.projection,
        "output_norm": layout.output_norm,
        "embedding": layout.embedding,
        "unembedding": layout.unembedding,
    }
    return {part: name for part, name in parts.items() if name is not None}


def _check(
    layout: Layout, modules: int, model: PreTrainedModel, layers: int, tensors: Mapping[str, StoredTensor]
) -> Native | None:
    """Compare the tensors with those that the layout has in this model."""
    path, template = _template(model, layers, layout)
    inside = revert_weight_conversion(model, {f"{path}.{name}": value for name, value in template.state_dict().items()})
    stem = _common_stem(inside, path)
    width, rows = model.get_output_embeddings().weight.shape[::-1]  # type: ignore[union-attr]
    sizes = {"projection": (width, 2 * width), "embedding": (rows, width), "unembedding": (rows, width)}
    expected: dict[str, tuple[int, ...]] = {}
    parts: dict[str, str] = {}
    begins: list[str] = []
    own = dict.fromkeys(("embedding", "unembedding"), False)
    for module in range(modules):
        begins.append(layout.part(layout.layer, module, layers) or "")
        expected |= {begins[-1] + name.removeprefix(stem): tuple(value.shape) for name, value in inside.items()}
        for part, pattern in _parts(layout).items():
            name = f"{layout.part(pattern, module, layers)}.weight"
            if part in own:
                own[part] |= name in tensors
                if not own[part]:
                    continue
            expected[name] = sizes.get(part, (width,))
            parts[f"{module}.{part}.weight"] = name
    parts = {_place(part, modules, own["embedding"]): name for part, name in parts.items()}
    problems = list(_differences(expected, tensors))
    if layout.template == "last" and not any(name in tensors for name in expected if name.startswith(begins[0] + "self_attn")):
        kind = type(template).__name__
        problems.append(f"it is like a layer with attention, and the model's last one ({kind}) has none")
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or [None]
    if layout.template == "first" and kinds[0] != kinds[-1]:
        problems.append(f"it is like the model's first layer ({kinds[0]}), and WMTP calls it as the last one ({kinds[-1]})")
    shown = "; ".join(problems[:_SHOWN]) + (f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")
    return Native(
        layout=layout.name,
        modules=modules,
        own_embedding=own["embedding"],
        own_unembedding=own["unembedding"],
        parts=parts,
        layers=tuple(begins),
        template=stem,
        template_path=path,
        tensors=tuple(sorted(tensors)),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        problem=shown or None,
    )


def _place(part: str, modules: int, own_embedding: bool) -> str:
    """Rename ``{module}.embedding.weight`` to its place in the list of heads: modules, embeddings, unembeddings."""
    module, name, _ = part.split(".")
    if name == "embedding":
        return f"{modules + int(module)}.weight"
    if name == "unembedding":
        return f"{modules * (1 + own_embedding) + int(module)}.weight"
    return part


def _differences(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in expected if name not in tensors)
    yield from (f"{name} is unexpected" for name in tensors if name not in expected)
    for name, shape in expected.items():
        if name in tensors and tensors[name].dtype not in _FLOATS:
            yield f"{name} is quantized ({tensors[name].dtype})"
        elif name in tensors and tensors[name].shape != shape:
            yield f"{name} has shape {list(tensors[name].shape)} in place of {list(shape)}"


def _template(model: PreTrainedModel, layers: int, layout: Layout) -> tuple[str, nn.Module]:
    """Find the decoder layer that a module's layer is like, and its path."""
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == layers}
    path = min(lists, key=lambda found: found.count("."))
    number = 0 if layout.template == "first" else layers - 1
    return f"{path}.{number}", lists[path][number]


def _common_stem(names: Mapping[str, object], path: str) -> str:
    """Return what all names in the folder of one decoder layer begin with."""
    number = path.rpartition(".")[2]
    stems = {found[0] for name in names if (found := re.match(rf".*?\blayers\.{number}\.", name))}
    return min(stems, default=f"{path}.")

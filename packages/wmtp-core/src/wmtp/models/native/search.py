"""Search for native layers by names and shapes alone.

Those of known layouts, among a folder's tensors. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from attrs import Factory, frozen

from wmtp.models.native.layouts import LAYOUTS, Layout

__all__ = [
    "NONE_FOUND",
    "Described",
    "Expected",
    "Problem",
    "Search",
    "differences",
    "expected_tensors",
    "is_mtp_name",
    "promised_in",
    "refusal",
    "search_layers",
    "search_nothing",
]

#: what to do about a folder that is not as it was published
_REFETCH: Final = "fetch the model again"
_IN_16_BITS: Final = "use the model in bf16 or fp32"
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_SHOWN: Final = 6
#: what is said of a folder without any
NONE_FOUND: Final = (
    "'native' are the model's own layers for multi-token prediction, and its files hold none of a layout that WMTP knows for "
    "it (docs/models.md lists them); name another kind, which makes new heads"
)
#: names of tensors and of fields of configs
_MTP: Final = re.compile(r"(^|[._])(mtp|nextn)([._\d]|$)")


def promised_in(fields: Mapping[str, Any]) -> dict[str, int]:
    """Find a config's fields that promise layers for multi-token prediction.

    They say how many, and are called ``mtp_num_hidden_layers``, ``num_nextn_predict_layers``, ``num_mtp_layers`` …
    """
    return {
        name: value
        for name, value in fields.items()
        if _MTP.search(name) and "num" in name.split("_") and isinstance(value, int) and value > 0
    }


def is_mtp_name(name: str, stems: Collection[str], layers: int) -> bool:
    """Recognize a tensor of a layer for multi-token prediction by its name.

    Args:
        name: of the tensor.
        stems: prefixes of ``layers.N`` in the names of decoder layers.
        layers: how many of those there are; further ones are for multi-token prediction.
    """
    if _MTP.search(name):
        return True
    found = re.match(r"(.*?\b)layers\.(\d+)\.", name)
    return found is not None and found[1] in stems and int(found[2]) >= layers


class Described(Protocol):
    """A tensor whose numbers are not read."""

    @property
    def dtype(self) -> str:
        """safetensors' name of its type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...


@frozen
class Problem:
    """Why layers cannot be opened.

    Args:
        text: what is wrong.
        remedy: what to do; None where nothing but other heads helps.
    """

    text: str
    remedy: str | None = _REFETCH


@frozen(kw_only=True)
class Search:
    """Layers of one layout.

    Args:
        layout: their layout.
        modules: names of each module's tensors, by its number.
        problem: why they cannot be opened.
    """

    layout: Layout
    modules: Mapping[int, list[str]] = Factory(dict)
    problem: Problem | None = None


@frozen(kw_only=True)
class Expected:
    """Tensors that the modules of a layout have.

    Args:
        shapes: by names in the folder.
        parts: names in the folder by ``{module}.{part}.weight``, except for what is in a decoder layer.
        begins: what the names of each module's decoder layer begin with.
        own: each module has a table of its own, by ``embedding`` and ``unembedding``.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, str]
    begins: tuple[str, ...]
    own: Mapping[str, bool]


def refusal(problem: Problem) -> str:
    """Word why native layers cannot be the heads, with the remedy."""
    remedy = "" if problem.remedy is None else f"{problem.remedy}, or "
    return (
        f"the model's own layers for multi-token prediction cannot be opened: {problem.text}; {remedy}name another kind "
        '(kind = "shared", say), which makes new heads and keeps these tensors as they are'
    )


def search_layers(
    names: Collection[str], *, layers: int, model_type: str, architectures: Sequence[str], promised: Mapping[str, int | None]
) -> Search | None:
    """Search for layers of a layout that this model type has.

    Args:
        names: of the folder's tensors; further ones do no harm.
        layers: decoder layers of the model.
        model_type: of its text model.
        architectures: as ``config.json`` says.
        promised: how many modules there are, by layouts' names; 0: it does not say so; None: that is not known.

    Returns:
        what was found, with a problem where it contradicts the config; None: nothing, or nothing of a layout that is known for
        this model.
    """
    present = {layout.name: found for layout in LAYOUTS if (found := _modules(layout, names, layers))}
    mine = [layout for layout in LAYOUTS if layout.name in present and _knows(layout, model_type, architectures)]
    if not mine:
        return None
    layout = mine[0]
    # some layouts name their tensors alike
    others = {name: found for name, found in present.items() if name == layout.name or found != present[layout.name]}
    if len(others) > 1:
        both = " and ".join(f"'{name}' ({found[min(found)][0]} …)" for name, found in others.items())
        return Search(layout=layout, problem=Problem(f"the folder holds layers of several layouts, {both}"))
    found = present[layout.name]
    number = promised[layout.name]
    if number is not None and (number != len(found) or set(found) != set(range(len(found)))):
        said = f"config.json says {layout.key} = {number}" if number else f"config.json does not say {layout.key}"
        held = f"{len(found)} (number {', '.join(map(str, sorted(found)))})"
        return Search(layout=layout, problem=Problem(f"{said}, and the folder holds {held} of them"))
    if layout.most is not None and len(found) > layout.most:
        some = f"WMTP opens {layout.most} module of the layout '{layout.name}', and the folder holds {len(found)}"
        return Search(layout=layout, problem=Problem(some, None))
    return Search(layout=layout, modules=found)


def search_nothing(said: Mapping[str, int], *, others: bool, model_type: str, architectures: Sequence[str]) -> Problem | None:
    """Compare a folder without native layers with its config.

    For where `search_layers` found nothing.

    Args:
        said: as `promised_in` gives it, of ``config.json`` itself: a model's defaults are no promise of a folder.
        others: the folder has tensors of some layer for multi-token prediction.
        model_type: as there.
        architectures: as there.
    """
    # of models whose layout is not known, such tensors are what the config says
    if not said or (others and not any(_knows(layout, model_type, architectures) for layout in LAYOUTS)):
        return None
    key, number = next(iter(said.items()))
    return Problem(f"config.json says {key} = {number}, and the folder holds none of them")


def expected_tensors(
    layout: Layout,
    modules: int,
    *,
    layers: int,
    template: Mapping[str, tuple[int, ...]],
    width: int,
    rows: int,
    tensors: Collection[str],
) -> Expected:
    """List the tensors that modules of a layout have in a model.

    Args:
        layout: it.
        modules: how many there are.
        layers: decoder layers of the model.
        template: shapes of the tensors of one of these, the one that the modules' layers are like, by names within it.
        width: D.
        rows: V.
        tensors: the folder's names, which tell whether modules have tables of their own.
    """
    sizes = {"projection": (width, 2 * width), "embedding": (rows, width), "unembedding": (rows, width)}
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, str] = {}
    begins: list[str] = []
    own: dict[str, bool] = dict.fromkeys(("embedding", "unembedding"), False)
    for module in range(modules):
        begins.append(layout.part(layout.layer, module, layers) or "")
        shapes |= {begins[-1] + name: shape for name, shape in template.items()}
        for part, pattern in _parts(layout).items():
            name = f"{layout.part(pattern, module, layers)}.weight"
            if part in own:
                own[part] |= name in tensors
                if not own[part]:
                    continue
            shapes[name] = sizes.get(part, (width,))
            parts[f"{module}.{part}.weight"] = name
    return Expected(shapes=shapes, parts=parts, begins=tuple(begins), own=own)


def differences(
    layout: Layout, expected: Expected, tensors: Mapping[str, Described], fields: Mapping[str, Any]
) -> Problem | None:
    """Compare the tensors of modules with those that they should have.

    Args:
        layout: of the modules.
        expected: what they should have.
        tensors: of the modules.
        fields: of the text model's config.
    """
    damage = [*_damage(expected.shapes, tensors)]
    quantized = [
        f"{name} is quantized ({tensors[name].dtype})"
        for name in expected.shapes
        if name in tensors and tensors[name].dtype not in _FLOATS
    ]
    inherent: list[str] = []
    attention = f"{expected.begins[0]}self_attn"
    if layout.template == "last" and not any(name.startswith(attention) for name in expected.shapes):
        inherent.append("it is like a layer with attention, and the model's last one has none")
    inherent += _other_attention(layout, fields)
    problems = [*damage, *quantized, *inherent]
    if not problems:
        return None
    shown = "; ".join(problems[:_SHOWN]) + (f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")
    return Problem(shown, None if inherent else _REFETCH if damage else _IN_16_BITS)


def _knows(layout: Layout, model_type: str, architectures: Sequence[str]) -> bool:
    if model_type not in layout.models:
        return False
    # WMTP opens MiMo as the Qwen2 that it is, and what else calls itself so has no such layers
    return layout.name != "mimo" or "MiMoForCausalLM" in architectures


def _modules(layout: Layout, names: Collection[str], layers: int) -> dict[int, list[str]]:
    """Group the names of a layout's tensors by module number."""
    found: dict[int, list[str]] = {}
    for module in range(len(names)):
        stems = [layout.part(part, module, layers) for part in _parts(layout).values()]
        begin = layout.part(layout.layer, module, layers) or ""
        own = [name for name in names if name.startswith(begin) or name.removesuffix(".weight") in stems]
        # what all modules share is of the first
        if not own or (module and not set(own) - set(found[0])):
            break
        found[module] = own
    return found


def _other_attention(layout: Layout, fields: Mapping[str, Any]) -> Iterator[str]:
    """Compare the layer's attention with that of the layer it resembles."""
    kinds, window = fields.get("layer_types") or [None], fields.get("sliding_window")
    first = {"mtp_layer_types": kinds[0], "mtp_sliding_windows": window}
    for key in layout.others:
        for value in fields.get(key) or ():
            if value != first[key]:
                like = f"the model's first layer, as which it is called, has {first[key]!r}"
                yield f"config.json says {key} = {value!r}, and {like}"
    if layout.always_turns and window is not None and kinds[0] == "full_attention":
        yield "its queries and keys are turned by position, and not those of the model's first layer, as which it is called"


def _parts(layout: Layout) -> dict[str, str]:
    """Name the parts of a module.

    By their names in `ChainedBlock`, or that of the table that they are.
    """
    parts = {
        "embedding_norm": layout.embedding_norm,
        "hidden_norm": layout.hidden_norm,
        "projection": layout.projection,
        "output_norm": layout.output_norm,
        "embedding": layout.embedding,
        "unembedding": layout.unembedding,
    }
    return {part: name for part, name in parts.items() if name is not None}


def _damage(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Described]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in shapes if name not in tensors)
    yield from (f"{name} is unexpected" for name in tensors if name not in shapes)
    for name, shape in shapes.items():
        if name in tensors and tensors[name].dtype in _FLOATS and tensors[name].shape != shape:
            yield f"{name} has shape {list(tensors[name].shape)} in place of {list(shape)}"

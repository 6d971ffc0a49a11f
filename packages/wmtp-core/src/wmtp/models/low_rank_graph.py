"""Adapted linear maps of one input, in compiled code.

An attention's queries, keys and values are maps of one input, as are the gate and the other half of an MLP. A model calls them
one by one; in the graph that torch traces, those of the same input become one operator.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from wmtp.models.low_rank import MAP, joined_linear

if TYPE_CHECKING:
    from wmtp.config.schema import DevicesConfig
    from wmtp.models.mtp import MTPModel

__all__ = ["compile_adapted", "join_maps", "join_weights"]


def compile_adapted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with adapted maps of one input as one operator."""
    return torch.compile(function, backend=_backend)


def _backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx  # its import takes seconds

    join_maps(graph)
    return compile_fx(graph, list(inputs))


def join_maps(traced: fx.GraphModule) -> None:
    """Join adapted maps of one input, in place.

    Args:
        traced: as torch.compile hands it to a backend; what it checkpoints is in modules of its own.
    """
    for module in traced.modules():
        if isinstance(module, fx.GraphModule):
            alike: dict[Any, list[fx.Node]] = {}
            for node in module.graph.find_nodes(op="call_function", target=MAP):
                x, _, scales, biases, _, _, scale, _ = node.args
                alike.setdefault((_origin(x), len(_listed(scales)), len(_listed(biases)), scale), []).append(node)
            for nodes in alike.values():
                if len(nodes) > 1 and _come_first(nodes):
                    # What is checkpointed keeps the result of each map. Otherwise attention keeps the values alone, and would
                    # hold all of a joined result.
                    _join(module.graph, nodes, one_result=module is not traced)
            module.recompile()


def _origin(node: Any) -> Any:
    """Name a value alike wherever it is converted alike."""
    return ("to", node.args) if isinstance(node, fx.Node) and (node.op, node.target) == ("call_method", "to") else node


def _come_first(nodes: list[fx.Node]) -> bool:
    """Move what later maps multiply by before the first one.

    Conversions of parameters can be; anything else is not expected, and the maps are left apart.
    """
    first, places = nodes[0], {node: place for place, node in enumerate(nodes[0].graph.nodes)}
    given = [node for other in nodes[1:] for node in other.all_input_nodes if node is not other.args[0]]
    late = [node for node in dict.fromkeys(given) if places[node] > places[first]]
    if any(_origin(node) is node or any(one.op != "placeholder" for one in node.all_input_nodes) for node in late):
        return False
    for node in late:
        first.prepend(node)
    return True


def _join(graph: fx.Graph, nodes: list[fx.Node], *, one_result: bool) -> None:
    x, *_, scale, _ = nodes[0].args
    weights, scales, biases, downs, ups = ([one for node in nodes for one in _listed(node.args[i])] for i in range(1, 6))
    with graph.inserting_before(nodes[0]):
        down = graph.call_function(torch.cat, (downs,))
        given = x, weights, scales, biases, down, ups, scale
        joined = graph.call_function(joined_linear, given) if one_result else graph.call_function(MAP, (*given, False))
        results = [graph.call_function(operator.getitem, (joined, index)) for index in range(len(nodes))]
    for node, result in zip(nodes, results, strict=True):
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(result)
            graph.erase_node(user)
        graph.erase_node(node)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


@torch.no_grad()
def join_weights(model: MTPModel, devices: DevicesConfig) -> None:
    """Put frozen weights that are multiplied together side by side.

    They stay parameters of their own.

    Args:
        model: in place; it is held whole by this process, and compiled.
        devices: the config section.
    """
    if model.adapter is None or not devices.compile or devices.activation_checkpointing == "none":
        return  # nothing is multiplied together
    from wmtp.models.low_rank_layers import AdaptedLinear  # imports peft

    for module in model.modules():
        alike: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for child in module.children():
            if isinstance(child, AdaptedLinear) and type(linear := child.base_layer) is nn.Linear:
                alike.setdefault((linear.in_features, linear.weight.dtype), []).append(linear.weight)
        for weights in (some for some in alike.values() if len(some) > 1):
            for weight, part in zip(weights, torch.cat(weights).split([len(one) for one in weights]), strict=True):
                weight.data = part
    torch.cuda.empty_cache()  # of the pieces that the weights were in; nothing without a GPU

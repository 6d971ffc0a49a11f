"""Adapted linear maps of one input, in compiled code.

An attention's queries, keys and values are maps of one input, as are the gate and the other half of an MLP. A model calls them
one by one; in the graph that torch traces, those of the same input become one operator.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from wmtp.models.low_rank import MAP

__all__ = ["compile_adapted", "join_maps"]


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
                x, _, scales, biases, *_, scale = node.args
                alike.setdefault((_origin(x), len(_listed(scales)), len(_listed(biases)), scale), []).append(node)
            for nodes in alike.values():
                if len(nodes) > 1 and _come_first(nodes):
                    _join(module.graph, nodes)
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


def _join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    x, *_, scale = nodes[0].args
    weights, scales, biases, downs, ups = ([one for node in nodes for one in _listed(node.args[i])] for i in range(1, 6))
    with graph.inserting_before(nodes[0]):
        down = graph.call_function(torch.cat, (downs,))
        joined = graph.call_function(MAP, (x, weights, scales, biases, down, ups, scale))
        results = [graph.call_function(operator.getitem, (joined, index)) for index in range(len(nodes))]
    for node, result in zip(nodes, results, strict=True):
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(result)
            graph.erase_node(user)
        graph.erase_node(node)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]

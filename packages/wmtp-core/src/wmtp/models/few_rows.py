"""Products of few rows in compiled code.

Each number of the weight is read once, for all rows. A step of decoding multiplies one to a few tokens by each weight. cuBLAS
in fp32 takes 3.4 µs for one row of 576 numbers and a weight of 576 × 576, and 10 µs for four rows; written as products and
sums, one for each row, Inductor makes one kernel of all rows, of 1.7 and 2.7 µs (H200), and joins it with what comes before and
after: a norm, a sum.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

__all__ = ["compile_few_rows", "step_code"]

#: most rows of a product that is written so; tensor cores multiply 16-bit numbers faster from 8 rows on
MOST_ROWS: Final = {True: 4, False: 8}
#: the same in fp32, where rows have at most `SHORT` numbers: 16 of 576 take 5 µs so, and 10 by cuBLAS; of 1,536, 14 and 13
MOST_SHORT_ROWS: Final = 16
SHORT: Final = 1024
#: largest output of more than one row: an unembedding of 49,152 takes 85 µs so for four rows, and 50 by cuBLAS
MOST_OUTPUTS: Final = 16_384
#: most rows of attention's products: the queries of all heads that share keys
MOST_QUERIES: Final = 24
#: most multiplications of such a product, some rows of a batch: the sums read keys and values once for each query
MOST_MULTIPLICATIONS: Final = 2**23


def compile_few_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for fixed shapes, with products of few rows as sums."""
    return torch.compile(function, dynamic=False, backend=_backend)


def step_code(function: Callable[..., Any], *, compiled: bool) -> Callable[..., Any]:
    """Return a function of a step, compiled or as it is."""
    return _compiled_once(function) if compiled else function


@functools.cache
def _compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    return compile_few_rows(function)


def _backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Compile what torch traced by Inductor, after the products are rewritten."""
    from torch._inductor.compile_fx import compile_fx  # its import takes seconds

    for node in graph.graph.nodes:
        found = _FORMS.get(node.target) if node.op == "call_function" else None
        if found is None or node.kwargs:
            continue
        given, other = (_example(value) for value in node.args[:2])
        if given is None or other is None or not given.is_floating_point():
            continue
        rewritten, fits = found
        if fits(given, other):
            node.target = rewritten
    graph.recompile()
    return compile_fx(graph, list(inputs))


def _example(value: Any) -> Tensor | None:
    return value.meta.get("example_value") if isinstance(value, fx.Node) else None


def linear_by_rows(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `torch.nn.functional.linear` does."""
    rows = given.reshape(-1, given.shape[-1]).float().unbind(0)
    products = [(weight.float() * row).sum(-1) for row in rows]
    joined = torch.stack(products) if len(products) > 1 else products[0].unsqueeze(0)
    if bias is not None:
        joined = joined + bias.float()
    return joined.to(given.dtype).reshape(*given.shape[:-1], weight.shape[0])


def matmul_by_rows(queries: Tensor, other: Tensor) -> Tensor:
    """Compute `torch.matmul` of ``[B, H, T, K]`` and ``[B, H, K, N]``."""
    if other.stride(-1) == 1:  # attention's values: one sum over all keys, which Inductor divides among blocks of threads
        return (queries.float().unsqueeze(-1) * other.float().unsqueeze(-3)).sum(-2).to(queries.dtype)
    across = other.float().transpose(-1, -2)
    products = [(across * row.unsqueeze(-2)).sum(-1) for row in queries.float().unbind(-2)]
    return torch.stack(products, dim=-2).to(queries.dtype)


def _few_linear(given: Tensor, weight: Tensor) -> bool:
    rows = given.numel() // given.shape[-1]
    coarse = given.dtype.itemsize == 2
    most = MOST_SHORT_ROWS if given.shape[-1] <= SHORT and not coarse else MOST_ROWS[coarse]
    small = rows == 1 or (rows <= most and weight.shape[0] <= MOST_OUTPUTS)
    return small and weight.dim() == 2 and given.dtype == weight.dtype


def _few_queries(given: Tensor, other: Tensor) -> bool:
    if not given.dim() == other.dim() == 4 or given.shape[:2] != other.shape[:2] or given.shape[2] > MOST_QUERIES:
        return False
    return given.numel() * other.shape[-1] <= MOST_MULTIPLICATIONS


_FORMS: dict[Any, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], bool]]] = {
    torch.nn.functional.linear: (linear_by_rows, _few_linear),
    operator.matmul: (matmul_by_rows, _few_queries),
}

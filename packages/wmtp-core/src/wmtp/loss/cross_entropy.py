"""Weighted cross entropy of H heads, one chunk of logits at once.

    L = Σ_i Σ_k c[i, k] · CE(logits_k(h_k[i]), x[i, k])

with coefficients c that already hold head weight, token weight and normalizer. The gradient of the hidden states and of the
unembedding is computed together with the loss, chunk by chunk, so the logits of a chunk are made once and kept nowhere.
A prediction whose coefficient is 0 costs its logits at most, and no product of the gradient.

All of it becomes one `Problem`, which `solve` gives to the implementation for its device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from attrs import define
from torch import Tensor

from wmtp.loss.fp8 import Fp8Logits
from wmtp.loss.unembedding import Unembedding

if TYPE_CHECKING:
    from wmtp.loss.objective import HeadObjective

__all__ = [
    "Answer",
    "HeadLayout",
    "Problem",
    "TokenPass",
    "check_shapes",
    "differentiable",
    "flatten",
    "implementation",
    "precision",
    "solve",
    "token_losses",
    "token_pass",
    "weighted_cross_entropy",
]

_HAS_TRITON: Final = importlib.util.find_spec("triton") is not None


# torch.compile traces no frozen classes of attrs
@define(slots=False)
class HeadLayout:
    """Indices of one head in `Problem.tensors`, and its logits' transform.

    Args:
        weight: place of the unembedding ``[V, D]``; heads that share one have the same place.
        bias: place of the bias ``[V]`` or None.
        scale: see `Unembedding`.
        softcap: see `Unembedding`.
    """

    weight: int
    bias: int | None
    scale: float
    softcap: float | None


@define(kw_only=True, eq=False, slots=False)
class Problem:
    """N positions with H predictions each.

    Args:
        tensors: first H hidden states ``[N, D]``, then every unembedding and bias once.
        heads: H layouts.
        ids: ``[N, H]`` int64.
        valid: ``[N, H]`` bool: whose token loss is wanted.
        compute: precision of the products.
        coefficients: ``[N, H]`` fp32; None where only token losses are wanted.
        wanted: for each tensor, whether its gradient is wanted.
        lse: ``[N, H]``, the logarithms of the sums of all exponentials from an earlier pass over the same predictions; then
            only predictions with a coefficient are computed, and no token losses.
        at_most: how many predictions have a coefficient, at most, in all heads together; None: it is not known on the host.
        valid_counts: how many predictions of each head are valid, at most; None: not known on the host.
        entropy: whether the entropy of the predictions is wanted.
        top_k: over how many of the most probable tokens; None: over all.
        objective: of heads 2..H; None: the cross entropy. With one, rows of text follow each other in ``ids``, and a valid
            prediction of head k at i needs head 1's at i+k−1.
        fp8: which products are in fp8; None: none.
    """

    tensors: Sequence[Tensor]
    heads: Sequence[HeadLayout]
    ids: Tensor
    valid: Tensor
    compute: torch.dtype
    coefficients: Tensor | None = None
    wanted: Sequence[bool] = ()
    lse: Tensor | None = None
    at_most: int | None = None
    valid_counts: Sequence[int] | None = None
    entropy: bool = False
    top_k: int | None = None
    objective: HeadObjective | None = None
    fp8: Fp8Logits | None = None

    @property
    def exact(self) -> torch.dtype:
        """Precision of sums: fp32, or fp64 for fp64."""
        return torch.promote_types(self.compute, torch.float32)

    def wants(self, place: int | None) -> bool:
        """Tell whether the gradient of the tensor at a place is wanted."""
        return place is not None and bool(self.wanted) and self.wanted[place]

    def cast(self) -> dict[int, Tensor]:
        """Cast unembeddings and biases to the products' precision, by index."""
        return {
            place: self.tensors[place].detach().to(self.compute)
            for head in self.heads
            for place in (head.weight, head.bias)
            if place is not None
        }


@define(kw_only=True, eq=False, slots=False)
class Answer:
    """Result of a problem.

    Args:
        losses: token losses ``[N, H]``, 0 where not valid; all 0 where `Problem.lse` was given.
        lse: ``[N, H]``, 0 where not valid.
        entropy: ``[N, H]`` in nats, 0 where not valid; None if not wanted.
        gradients: of Σ coefficients · losses; one a tensor, None where not wanted. Of unembeddings and biases in
            `Problem.exact`, of hidden states in their own precision.
        broken: a bool on the device: more predictions counted than `Problem` said; None where that cannot be.
        values: with an objective, ``[N, H]``: its value for heads 2..H; 0 where there is no coefficient, and for head 1.
        overlap: with an objective, ``[N, H]``, Σ min(p, q); see `wmtp.loss.objective.HeadAgreement`.
        same_top: with an objective, ``[N, H]`` bool.
    """

    losses: Tensor
    lse: Tensor
    entropy: Tensor | None
    gradients: list[Tensor | None]
    broken: Tensor | None = None
    values: Tensor | None = None
    overlap: Tensor | None = None
    same_top: Tensor | None = None


@define(kw_only=True, eq=False, slots=False)
class TokenPass:
    """Result of a pass over the predictions without gradients: losses, log-sum-exp, entropy.

    Args:
        losses: ``[…, H]`` fp32 (fp64 for fp64 hidden states), the token losses, 0 where not valid.
        lse: ``[…, H]``, log-sum-exp of the logits, which `weighted_cross_entropy` can reuse.
        entropy: ``[…, H]`` in nats, 0 where not valid; None if not asked for.
    """

    losses: Tensor
    lse: Tensor
    entropy: Tensor | None = None


def weighted_cross_entropy(
    hidden: Sequence[Tensor],
    unembeddings: Sequence[Unembedding],
    ids: Tensor,
    coefficients: Tensor,
    valid: Tensor,
    *,
    precomputed: TokenPass | None = None,
    at_most: int | None = None,
    valid_counts: Sequence[int] | None = None,
    fp8: Fp8Logits | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the weighted loss of all heads, and the token losses.

    Args:
        hidden: one ``[…, D]`` a head, the input of that head's unembedding.
        unembeddings: one a head; heads may share one, whose gradient is then accumulated once, in fp32.
        ids: ``[…, H]`` int64, the targets.
        coefficients: ``[…, H]``, without gradient; 0 where a prediction does not count.
        valid: ``[…, H]`` bool, the predictions whose token loss is wanted. Must include every non-zero coefficient; where
            the token losses are known already, ``coefficients != 0`` saves the logits of the others too.
        precomputed: the pass over the same hidden states that the coefficients were made from. Its token losses are
            returned, and only predictions with a coefficient are computed.
        at_most: how many coefficients are not 0, or an upper bound, where the host knows it. On a GPU the products of no
            more predictions are started, and nothing is read back. If there are more, the loss is NaN.
        valid_counts: H numbers, how many predictions of each head are valid, or upper bounds; as ``at_most``.
        fp8: which products are in fp8; None: none. ``precomputed`` must be of the same.

    Returns:
        the loss, a scalar with gradient; and the token losses ``[…, H]`` fp32, detached, 0 where not valid.

    Raises:
        TypeError: a tensor is sharded (a DTensor), or the tensors do not fit each other.
    """
    check_shapes(hidden, unembeddings, ids)
    heads, tensors = flatten(hidden, unembeddings)
    loss, losses = differentiable(heads, tensors, ids, coefficients, valid, precomputed, at_most, valid_counts, fp8=fp8)
    return loss, losses


def differentiable(
    heads: Sequence[HeadLayout],
    tensors: Sequence[Tensor],
    ids: Tensor,
    coefficients: Tensor,
    valid: Tensor,
    precomputed: TokenPass | None,
    at_most: int | None,
    valid_counts: Sequence[int] | None,
    objective: HeadObjective | None = None,
    fp8: Fp8Logits | None = None,
) -> tuple[Tensor, ...]:
    """Compute the loss with gradient; arguments as `Problem` and `weighted_cross_entropy` have them.

    Returns:
        the loss and the token losses ``[…, H]``; with an objective also the values, overlaps and ``same_top`` of `Answer`.
    """
    horizon = ids.shape[-1]
    loss, *by_prediction = _WeightedCrossEntropy.apply(
        ids.reshape(-1, horizon),
        coefficients.detach().reshape(-1, horizon),
        valid.reshape(-1, horizon),
        None if precomputed is None else precomputed.losses.reshape(-1, horizon),
        None if precomputed is None else precomputed.lse.reshape(-1, horizon),
        tuple((h.weight, h.bias, h.scale, h.softcap) for h in heads),
        precision(tensors[0]),
        torch.is_grad_enabled(),
        at_most,
        None if valid_counts is None else tuple(valid_counts),
        objective,
        fp8,
        *tensors,
    )
    return loss, *(tensor.reshape(ids.shape) for tensor in by_prediction)


def token_losses(hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding], ids: Tensor, valid: Tensor) -> Tensor:
    """Compute the cross entropy of every valid prediction, without gradients.

    Args:
        hidden: one ``[…, D]`` a head.
        unembeddings: one a head.
        ids: ``[…, H]`` int64, the targets.
        valid: ``[…, H]`` bool.

    Returns:
        ``[…, H]`` fp32 (fp64 for fp64 hidden states), 0 where not valid.
    """
    return token_pass(hidden, unembeddings, ids, valid).losses


@torch.no_grad()
def token_pass(
    hidden: Sequence[Tensor],
    unembeddings: Sequence[Unembedding],
    ids: Tensor,
    valid: Tensor,
    *,
    entropy: bool = False,
    top_k: int | None = None,
    valid_counts: Sequence[int] | None = None,
    fp8: Fp8Logits | None = None,
) -> TokenPass:
    """Compute cross entropy and entropy of every valid prediction, without gradients.

    Args:
        hidden: one ``[…, D]`` a head.
        unembeddings: one a head.
        ids: ``[…, H]`` int64, the targets.
        valid: ``[…, H]`` bool.
        entropy: also compute the entropy.
        top_k: take the entropy over the ``top_k`` most probable tokens, renormalized; None: over all.
        valid_counts: see `weighted_cross_entropy`. If there are more, all token losses are NaN.
        fp8: which products are in fp8; None: none.
    """
    check_shapes(hidden, unembeddings, ids)
    heads, tensors = flatten([h.detach() for h in hidden], unembeddings)
    horizon = ids.shape[-1]
    answer = solve(
        Problem(
            tensors=[tensor.detach() for tensor in tensors],
            heads=heads,
            ids=ids.reshape(-1, horizon),
            valid=valid.reshape(-1, horizon),
            compute=precision(tensors[0]),
            valid_counts=valid_counts,
            entropy=entropy,
            top_k=top_k,
            fp8=fp8,
        )
    )
    losses = answer.losses if answer.broken is None else torch.where(answer.broken, torch.nan, answer.losses)
    return TokenPass(
        losses=losses.reshape(ids.shape),
        lse=answer.lse.reshape(ids.shape),
        entropy=None if answer.entropy is None else answer.entropy.reshape(ids.shape),
    )


class _WeightedCrossEntropy(torch.autograd.Function):
    """Autograd function whose forward pass computes the gradients.

    They are those for an upstream gradient of 1; the backward pass scales them.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        ids: Tensor,
        coefficients: Tensor,
        valid: Tensor,
        known_losses: Tensor | None,
        lse: Tensor | None,
        layouts: tuple[tuple[int, int | None, float, float | None], ...],
        compute: torch.dtype,
        with_gradient: bool,
        at_most: int | None,
        valid_counts: tuple[int, ...] | None,
        objective: HeadObjective | None,
        fp8: Fp8Logits | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        unit = None
        if compute == torch.float16:
            # coefficients of 1 / Z, times probabilities, would leave the range of fp16
            unit = coefficients.abs().max().float() / 256
            coefficients = torch.where(unit > 0, coefficients / unit, 0.0)
        answer = solve(
            Problem(
                tensors=[tensor.detach() for tensor in tensors],
                heads=[HeadLayout(*layout) for layout in layouts],
                ids=ids,
                valid=valid,
                compute=compute,
                coefficients=coefficients,
                wanted=[with_gradient and needed for needed in ctx.needs_input_grad[-len(tensors) :]],
                lse=lse,
                at_most=at_most,
                valid_counts=valid_counts,
                objective=objective,
                fp8=fp8,
            )
        )
        losses = answer.losses.contiguous() if known_losses is None else known_losses.clone()
        values = losses
        if answer.values is not None:
            values = torch.cat([losses[:, :1], answer.values[:, 1:]], dim=1)
        # NaN · 0 is NaN: an infinite token loss must show in the loss only where it counts
        loss = torch.where(coefficients != 0, values * coefficients.to(losses.dtype), 0.0).sum()
        if unit is not None:
            loss = loss * unit
        if answer.broken is not None:
            loss = torch.where(answer.broken, torch.nan, loss)
        ctx.wanted = [gradient is not None for gradient in answer.gradients]
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(unit, *(gradient for gradient in answer.gradients if gradient is not None))
        by_prediction = (losses,)
        if answer.overlap is not None and answer.same_top is not None:
            by_prediction = losses, values, answer.overlap, answer.same_top
        ctx.mark_non_differentiable(*by_prediction)
        return loss, *by_prediction

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("weighted_cross_entropy has no second derivative (create_graph=True)")
        unit, *saved = ctx.saved_tensors
        factor = upstream if unit is None else upstream * unit
        may_change = not torch.compiler.is_compiling() and not _graph_is_kept()
        found = iter(saved)
        gradients = [
            scaled(next(found), factor, dtype, may_change) if wanted else None
            for wanted, dtype in zip(ctx.wanted, ctx.dtypes, strict=True)
        ]
        return (None,) * 12 + tuple(gradients)


def implementation(device: torch.device, compute: torch.dtype) -> str:
    """Name the loss implementation of a device: ``fused`` or ``plain``.

    ``fused`` is for CUDA and ROCm, where Triton is installed.
    """
    able = device.type == "cuda" and _HAS_TRITON and compute in (torch.bfloat16, torch.float16, torch.float32)
    return "fused" if able else "plain"


def solve(problem: Problem) -> Answer:
    """Compute token losses, and gradients where they are wanted."""
    if torch.compiler.is_compiling():
        if problem.objective is not None:
            raise NotImplementedError("an objective of heads 2..H is not traced; call the loss outside of torch.compile")
        if problem.fp8 is not None:
            raise NotImplementedError("logits in fp8 are not traced; call the loss outside of torch.compile")
        from wmtp.loss.operator import solve_by_operator

        return solve_by_operator(problem)
    with torch.no_grad(), torch.autocast(problem.ids.device.type, enabled=False):
        if problem.objective is not None:
            from wmtp.loss.torch_backend import agreement

            return agreement.compute(problem)
        if implementation(problem.ids.device, problem.compute) == "plain":
            from wmtp.loss.torch_backend import plain

            return plain.compute(problem)
        from wmtp.loss.triton import fused  # imports Triton

        with torch.cuda.device_of(problem.ids):  # Triton computes on the current device, wherever its arguments are
            return fused.compute(problem)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, may_change: bool) -> Tensor:
    """Compute ``gradient · factor`` in a precision.

    Args:
        gradient: of `Answer`.
        factor: scalar, on the same device.
        dtype: of what is returned.
        may_change: ``gradient`` is not needed again.
    """
    if torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    if implementation(gradient.device, gradient.dtype) == "fused":
        from wmtp.loss.triton import fused

        with torch.cuda.device_of(gradient):
            return fused.scaled(gradient, factor, dtype, may_change)
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return gradient.to(dtype, copy=not may_change)
    factor = factor.to(gradient.dtype)
    if may_change and gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _graph_is_kept() -> bool:
    """Return True under ``retain_graph``: gradients must survive for another backward pass."""
    asked = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def flatten(hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding]) -> tuple[list[HeadLayout], list[Tensor]]:
    """List all tensors once, for autograd, with each head's indices."""
    tensors = [h.reshape(-1, h.shape[-1]) for h in hidden]
    first = len(tensors)

    def place(tensor: Tensor) -> int:
        for i in range(first, len(tensors)):
            if tensors[i] is tensor or _same_storage(tensors[i], tensor):
                return i
        tensors.append(tensor)
        return len(tensors) - 1

    heads = []
    for u in unembeddings:
        bias = None if u.bias is None else place(u.bias)
        heads.append(HeadLayout(place(u.weight), bias, u.scale, u.softcap))
    return heads, tensors


def _same_storage(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are one weight.

    Detached aliases of one weight are different objects; those with a gradient are told apart by autograd.
    """
    if one.requires_grad or other.requires_grad or torch.compiler.is_compiling():
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def precision(hidden: Tensor) -> torch.dtype:
    """Find the precision of the products."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def check_shapes(hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding], ids: Tensor) -> None:
    """Refuse tensors that do not fit each other.

    Raises:
        TypeError: naming the head and the shapes.
    """
    horizon = ids.shape[-1]
    if not len(hidden) == len(unembeddings) == horizon:
        raise TypeError(
            f"targets of shape {list(ids.shape)} are for H = {horizon} heads; there are {len(hidden)} hidden states and "
            f"{len(unembeddings)} unembeddings"
        )
    for k, (states, unembedding) in enumerate(zip(hidden, unembeddings, strict=True)):
        if any(hasattr(tensor, "full_tensor") for tensor in (states, unembedding.weight, unembedding.bias)):
            raise TypeError(
                f"head {k + 1}: the loss takes plain tensors, and this is a DTensor; compute the loss where FSDP has gathered "
                f"the unembedding (in the forward method of the module that holds it), or pass weight.full_tensor()"
            )
        weight = unembedding.weight
        if weight.dim() != 2 or states.shape != (*ids.shape[:-1], weight.shape[1]):
            raise TypeError(
                f"head {k + 1}: hidden states {list(states.shape)}, unembedding [V, D] {list(weight.shape)} and targets "
                f"[..., H] {list(ids.shape)} do not fit each other"
            )

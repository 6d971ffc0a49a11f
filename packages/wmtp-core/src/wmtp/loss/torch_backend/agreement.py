"""Heads 2..H against head 1, in plain PyTorch.

Chunks go by the positions of head 1, whose distribution serves all heads.

Head 1's own loss is computed where it always is. Then, for a chunk of positions j, head 1's logits are made once more, and of
each head k its logits at j − (k−1), which predict the same token. So the products are those of the cross entropy and one more
for all heads together, and the memory is that of a few chunks of one head's logits, however many heads there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from attrs import evolve
from torch import Tensor

from wmtp.loss.cross_entropy import Answer, HeadLayout, Problem, implementation
from wmtp.loss.objective import HeadObjective
from wmtp.loss.torch_backend import plain

__all__ = ["compute"]

#: bytes of fp32 logits of one head that are held at once; about eight times as much is, in all
_CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 192 * 2**20}

#: bytes of fp32 logits that a CPU works on at once
_SLICE_BYTES = 2**20


def compute(problem: Problem) -> Answer:
    """See `Problem` and `Answer`."""
    if implementation(problem.ids.device, problem.compute) == "plain":
        answer = plain.compute(_head_one(problem))
    else:
        from wmtp.loss.triton import fused  # imports Triton

        answer = fused.compute(_head_one(problem))
    return _Comparison(problem, answer).run()


def picks_rows(device: torch.device) -> bool:
    """Tell whether a head's rows are counted on the host.

    Elsewhere that would wait for the device.
    """
    return device.type == "cpu"


def _head_one(problem: Problem) -> Problem:
    """Leave out heads 2..H, but not their unembeddings."""
    extra = problem.ids.shape[1] - 1
    first = problem.heads[0]
    bias = None if first.bias is None else first.bias - extra
    return evolve(
        problem,
        tensors=[problem.tensors[0], *problem.tensors[extra + 1 :]],
        heads=[HeadLayout(first.weight - extra, bias, first.scale, first.softcap)],
        ids=problem.ids[:, :1],
        valid=problem.valid[:, :1],
        coefficients=None if problem.coefficients is None else problem.coefficients[:, :1],
        wanted=[problem.wanted[0], *problem.wanted[extra + 1 :]] if problem.wanted else (),
        lse=None if problem.lse is None else problem.lse[:, :1],
        valid_counts=None if problem.valid_counts is None else problem.valid_counts[:1],
        objective=None,
    )


class _Comparison:
    """Adds heads 2..H to what was computed of head 1.

    Args:
        problem: of all heads.
        first: the answer of head 1.
    """

    def __init__(self, problem: Problem, first: Answer) -> None:
        positions, horizon = problem.ids.shape
        self._problem = problem
        self._first = first
        self._cast = problem.cast()
        self._picks = picks_rows(problem.ids.device)
        # one more row, for a chunk's data besides the predictions of a head
        shape = 4, positions + 1, horizon
        numbers = torch.zeros(shape, dtype=problem.exact, device=problem.ids.device)
        self._losses, self._lse, self._values, self._overlap = numbers
        self._losses[:-1, :1], self._lse[:-1, :1] = first.losses, first.lse
        self._overlap[:-1, 0] = problem.valid[:, 0]
        self._same_top = self._overlap > 0
        counts = torch.zeros_like(problem.valid) if problem.coefficients is None else problem.coefficients != 0
        self._wanted = counts if problem.lse is not None else problem.valid | counts
        self._gradients = self._new_gradients()

    def _new_gradients(self) -> list[Tensor | None]:
        problem, horizon = self._problem, self._problem.ids.shape[1]
        heads = [torch.zeros_like(problem.tensors[k]) if problem.wants(k) else None for k in range(1, horizon)]
        return [self._first.gradients[0], *heads, *self._first.gradients[1:]]

    def run(self) -> Answer:
        """Compute all chunks."""
        positions, horizon = self._problem.ids.shape
        asked = torch.zeros(positions, dtype=torch.bool, device=self._wanted.device)
        for k in range(1, min(horizon, positions)):
            asked[k:] |= self._wanted[:-k, k]
        bound = self._bound()
        if bound is None:
            places, broken = plain.rows_of(asked), None
        else:
            # as many as there may be: nothing waits for the device
            places = torch.argsort(~asked, stable=True)[:bound]
            broken = asked.sum() > bound
        vocabulary = len(self._problem.tensors[self._problem.heads[0].weight])
        size = max(1, _CHUNK_BYTES["cpu" if self._problem.ids.device.type == "cpu" else "cuda"] // (4 * vocabulary))
        for chunk in places.split(size) if len(places) else ():
            self._chunk(chunk, asked[chunk])
        if broken is not None and self._first.broken is not None:
            broken = broken | self._first.broken
        return Answer(
            losses=self._losses[:-1],
            lse=self._lse[:-1],
            entropy=None,
            gradients=self._gradients,
            broken=self._first.broken if broken is None else broken,
            values=self._values[:-1],
            overlap=self._overlap[:-1],
            same_top=self._same_top[:-1],
        )

    def _bound(self) -> int | None:
        """Bound the positions that heads 2..H answer to, if known.

        It is where the host knows it, so that no device has to be asked.
        """
        counts = self._problem.valid_counts
        return None if counts is None or self._picks else min(counts[0], len(self._problem.ids))

    def _chunk(self, places: Tensor, answered: Tensor) -> None:
        """Compare heads 2..H with head 1 at some positions.

        Those not ``answered`` count nowhere, and may hold NaN.
        """
        problem, positions = self._problem, len(self._problem.ids)
        own = problem.heads[0]
        states = torch.where(answered.unsqueeze(1), problem.tensors[0].detach()[places].to(problem.compute), 0.0)
        target = self._logits(own, states)
        log_p = plain.transformed(target.to(problem.exact), own).log_softmax(dim=1)
        p, top = log_p.exp(), log_p.argmax(dim=1)  # once for all heads
        for k, head in enumerate(problem.heads[1:], start=1):
            at = places - k
            asked = (at >= 0) & self._wanted[at.clamp(min=0), k]
            picked = plain.rows_of(asked) if self._picks else None
            if picked is not None:
                if not len(picked):
                    continue
                at = at[picked]
            else:
                at = torch.where(asked, at, positions)
            read = at.clamp(max=positions - 1)
            hidden = problem.tensors[k].detach()[read].to(problem.compute)
            hidden = torch.where((at < positions).unsqueeze(1), hidden, 0.0)  # what counts nowhere may be NaN
            logits = self._logits(head, hidden)
            c = self._coefficients(at, read, k)
            learns = c is not None and (problem.wants(k) or problem.wants(head.weight) or problem.wants(head.bias))
            step = max(1, _SLICE_BYTES // (4 * logits.shape[1])) if self._picks else len(logits)
            for start in range(0, len(logits), step):
                part = slice(start, start + step)
                rows_of_p = part if picked is None else picked[part]
                there = log_p[rows_of_p], p[rows_of_p], top[rows_of_p]
                given = problem.ids[read[part], k], problem.objective, None if c is None else c[part]
                found = _compare(there, logits[part].to(problem.exact), head, *given, learns=learns)
                rows = at[part]
                self._losses[rows, k], self._lse[rows, k] = found.loss, found.lse
                self._overlap[rows, k], self._same_top[rows, k] = found.overlap, found.same_top
                self._values[rows, k] = found.value
                if found.slope is not None:
                    if head.bias is not None and (gradient := self._gradients[head.bias]) is not None:
                        gradient += found.slope.sum(0)
                    logits[part] = found.slope
            if not learns:
                continue
            if (gradient := self._gradients[k]) is not None:
                gradient.index_add_(0, read, (logits @ self._cast[head.weight]).to(gradient.dtype))
            if (gradient := self._gradients[head.weight]) is not None:
                self._add_product(gradient, logits, hidden)

    def _coefficients(self, at: Tensor, read: Tensor, k: int) -> Tensor | None:
        """Of a chunk's predictions by head k+1."""
        coefficients = self._problem.coefficients
        if coefficients is None:
            return None
        return torch.where(at < len(coefficients), coefficients[read, k], 0.0).to(self._problem.exact)

    def _logits(self, head: HeadLayout, hidden: Tensor) -> Tensor:
        return plain.logits_of(hidden, self._cast, head)

    def _add_product(self, gradient: Tensor, slope: Tensor, hidden: Tensor) -> None:
        if self._picks or implementation(slope.device, slope.dtype) == "plain":
            plain.add_product(gradient, slope, hidden)
            return
        from wmtp.loss.triton import fused

        fused.add_product(gradient, slope.T, hidden, first=False)


class _Compared(NamedTuple):
    """Some predictions of one head.

    Args:
        loss: ``[n]``, cross entropy with the data.
        lse: ``[n]``.
        overlap: ``[n]``, Σ min(p, q).
        same_top: ``[n]`` bool.
        value: ``[n]``, the objective.
        slope: ``[n, V]``, c · the gradient of the objective by the logits before scale and cap; None where nothing learns.
    """

    loss: Tensor
    lse: Tensor
    overlap: Tensor
    same_top: Tensor
    value: Tensor
    slope: Tensor | None


def _compare(
    target: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    head: HeadLayout,
    ids: Tensor,
    objective: HeadObjective | None,
    coefficients: Tensor | None,
    *,
    learns: bool,
) -> _Compared:
    """Compare distributions.

    Args:
        target: of head 1 log p and p ``[n, V]``, and the most probable token ``[n]``.
        logits: ``[n, V]`` of head k, which it may change.
        head: how these are scaled and capped.
        ids: ``[n]``, the data's tokens.
        objective: of the head.
        coefficients: ``[n]``; None: the objective is not wanted.
        learns: whether its gradient is.
    """
    log_p, p, top = target
    z = plain.transformed(logits, head)
    lse = z.logsumexp(dim=1, keepdim=True)
    through = None if head.softcap is None or not learns else 1 - (z / head.softcap).square_()
    log_q = z.sub_(lse)
    loss = -log_q.gather(1, ids.unsqueeze(1)).squeeze(1)
    same_top = top == log_q.argmax(dim=1)
    q = log_q.exp()
    difference = q - p
    overlap = 1 - difference.abs().sum(dim=1) / 2
    if coefficients is None or objective is None:
        return _Compared(loss, lse.squeeze(1), overlap, same_top, torch.zeros_like(loss), None)
    # a probability of 0 adds nothing, and 0 · ∞ would be NaN
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=1) if objective.name != "tv" else torch.zeros_like(loss)
    share = {"kl": torch.ones_like(overlap), "tv": torch.zeros_like(overlap)}.get(objective.name)
    if share is None:
        share = (-objective.eta * overlap).exp()
    value = share * kl + (1 - share) * (1 - overlap)
    value = torch.where(coefficients != 0, value, 0.0)
    if not learns:
        return _Compared(loss, lse.squeeze(1), overlap, same_top, value, None)
    slope = difference * (coefficients * share).unsqueeze(1)
    if objective.name != "kl":
        sign = difference.sign_()
        sign -= (q * sign).sum(dim=1, keepdim=True)
        slope.addcmul_(q.mul_(sign), (coefficients * (1 - share) / 2).unsqueeze(1))
    if head.scale != 1.0:
        slope *= head.scale
    if through is not None:
        slope *= through
    return _Compared(loss, lse.squeeze(1), overlap, same_top, value, slope)

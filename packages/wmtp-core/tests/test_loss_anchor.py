"""KL from another model's predictions against the whole distributions in float64, and by finite differences."""

import pytest
import torch

from wmtp.loss import Unembedding
from wmtp.loss import anchor as module
from wmtp.loss.anchor import divergence_from


def case(*, bias=False, scale=1.0, softcap=None):
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
    other = new(2, 6, 3).detach(), Unembedding(weight=new(7, 3).detach(), softcap=1.5)
    own = Unembedding(weight=new(7, 4), bias=new(7) if bias else None, scale=scale, softcap=softcap)
    return other, new(2, 6, 4), own, torch.rand(2, 6, generator=g) > 0.3


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("kwargs", [{}, {"bias": True, "scale": 0.5, "softcap": 2.0}], ids=str)
def test_equals_the_whole_distributions(monkeypatch, kwargs, chunk):
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 4 * 7 * chunk)
    other, hidden, own, valid = case(**kwargs)
    ours = divergence_from(other, hidden, own, valid)
    p, q = other[1].logits(other[0]).softmax(-1), own.logits(hidden).softmax(-1)
    theirs = torch.where(valid, (p * (p / q).log()).sum(-1), 0.0)
    torch.testing.assert_close(ours, theirs)
    leaves = [hidden, own.weight, *([own.bias] if own.bias is not None else [])]
    upstream = torch.arange(12, dtype=torch.float64).view(2, 6)
    pairs = zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True)
    for mine, reference in pairs:
        torch.testing.assert_close(mine, reference)


def test_gradcheck_and_what_counts_nowhere():
    other, hidden, own, valid = case()
    run = lambda states, weight: divergence_from(other, states, Unembedding(weight=weight), valid)
    assert torch.autograd.gradcheck(run, (hidden, own.weight))
    poisoned = torch.where(valid[..., None], hidden.detach(), torch.nan).requires_grad_()
    same = torch.where(valid[..., None], other[0], torch.nan), other[1]
    found = divergence_from(same, poisoned, own, valid)
    torch.testing.assert_close(found, run(hidden, own.weight))
    assert torch.autograd.grad(found.sum(), own.weight)[0].isfinite().all()

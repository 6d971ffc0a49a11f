"""Objectives of heads 2..H against loops over predictions in float64, and by finite differences."""

import pytest
import torch

from wmtp.loss import HeadObjective, Unembedding, head_agreement, token_pass, weighted_cross_entropy, weighted_head_loss
from wmtp.loss.torch_backend import agreement as module

OBJECTIVES = [HeadObjective("kl"), HeadObjective("tv"), HeadObjective("lk", 2.0)]


def case(b=2, s=6, h=3, d=5, v=11, *, seed=0, bias=False, scale=1.0, softcap=None, own=False):
    """Rows of two documents each, the first of four positions; some predictions have no coefficient."""
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
    hidden = [new(b, s, d) for _ in range(h)]
    first = Unembedding(weight=new(v, d), bias=new(v) if bias else None, scale=scale, softcap=softcap)
    unembeddings = [
        first,
        *(Unembedding(weight=new(v, d), scale=scale, softcap=softcap) if own else first for _ in range(h - 1)),
    ]
    ids = torch.randint(v, (b, s, h), generator=g)
    document = (torch.arange(s) >= 4).long()
    valid = torch.zeros(b, s, h, dtype=torch.bool)
    for t in range(s):
        for k in range(1, h + 1):
            valid[:, t, k - 1] = t + k < s and bool(document[t] == document[min(t + k, s - 1)])
    coefficients = torch.rand(b, s, h, generator=g, dtype=torch.float64) * valid * (torch.rand(b, s, h, generator=g) > 0.3)
    return hidden, unembeddings, ids, coefficients, valid


def loops(hidden, unembeddings, ids, coefficients, objective):
    """One prediction at a time; head 1's distribution and λ are constants."""

    def distribution(k, b, t):
        u = unembeddings[k]
        z = u.weight @ hidden[k][b, t]
        z = (z if u.bias is None else z + u.bias) * u.scale
        return torch.softmax(z if u.softcap is None else u.softcap * torch.tanh(z / u.softcap), 0)

    total = torch.zeros((), dtype=torch.float64)
    for b, t, k in coefficients.nonzero().tolist():
        q = distribution(k, b, t)
        if k == 0:
            value = -q[ids[b, t, k]].log()
        else:
            p = distribution(0, b, t + k).detach()
            kl, tv = (p * (p / q).log()).sum(), (p - q).abs().sum() / 2
            share = torch.exp(-objective.eta * torch.minimum(p, q).sum()).detach()
            value = {"kl": kl, "tv": tv, "lk": share * kl + (1 - share) * tv}[objective.name]
        total = total + coefficients[b, t, k] * value
    return total


def leaves(hidden, unembeddings):
    found = {id(t): t for u in unembeddings for t in (u.weight, u.bias) if t is not None}
    return [*hidden, *found.values()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize(
    ("kwargs", "chunk", "part"),
    [
        ({}, 10_000, 10_000),
        ({"bias": True}, 3, 2),
        ({"softcap": 2.0, "scale": 0.5, "bias": True}, 10_000, 1),
        ({"own": True, "b": 1}, 1, 10_000),
        ({"h": 5, "s": 4}, 3, 10_000),
    ],
    ids=str,
)
def test_equals_the_loops_in_value_and_gradient(monkeypatch, kwargs, chunk, part, objective):
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 4 * 11 * chunk)
    monkeypatch.setattr(module, "_SLICE_BYTES", 4 * 11 * part)
    hidden, unembeddings, ids, coefficients, valid = case(**kwargs)
    ours = weighted_head_loss(hidden, unembeddings, ids, coefficients, valid, objective)
    theirs = loops(hidden, unembeddings, ids, coefficients, objective)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-12, atol=1e-12)
    wanted = leaves(hidden, unembeddings)
    gradients = [torch.autograd.grad(loss, wanted, materialize_grads=True) for loss in (ours.loss, theirs)]
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)
    _, losses = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
    torch.testing.assert_close(ours.agreement.token_losses, losses)


@pytest.mark.parametrize("objective", OBJECTIVES[::2], ids=lambda o: o.name)
def test_gradcheck_of_what_has_no_constants(objective):
    """Head 1 gets no gradient of the objective, and λ none, so finite differences are taken for the heads' own tensors."""
    objective = HeadObjective(objective.name, 0.0)  # λ = 1, a constant
    hidden, unembeddings, ids, coefficients, valid = case(h=2, d=3, v=4, own=True, softcap=2.0)
    coefficients[..., 0] = 0

    def run(states, weight):
        heads = [unembeddings[0], Unembedding(weight=weight, softcap=2.0)]
        return weighted_head_loss([hidden[0].detach(), states], heads, ids, coefficients, valid, objective).loss

    assert torch.autograd.gradcheck(run, (hidden[1], unembeddings[1].weight))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_a_second_phase_gives_the_same_for_less(objective):
    hidden, unembeddings, ids, coefficients, valid = case()
    whole = weighted_head_loss(hidden, unembeddings, ids, coefficients, valid, objective)
    known = token_pass(hidden, unembeddings, ids, valid)
    later = weighted_head_loss(hidden, unembeddings, ids, coefficients, valid, objective, precomputed=known)
    few = weighted_head_loss(hidden, unembeddings, ids, coefficients, coefficients != 0, objective)
    torch.testing.assert_close(later.agreement.token_losses, whole.agreement.token_losses)
    wanted = leaves(hidden, unembeddings)
    expected = torch.autograd.grad(whole.loss, wanted)
    for other in (later, few):
        torch.testing.assert_close(other.loss, whole.loss)
        torch.testing.assert_close(other.values * (coefficients != 0), whole.values * (coefficients != 0))
        for mine, reference in zip(torch.autograd.grad(other.loss, wanted), expected, strict=True):
            torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize("counted", [False, True])
def test_the_way_of_devices_that_are_not_asked_gives_the_same(monkeypatch, objective, counted):
    """Without picking rows on the host, as on a GPU; test_loss_cuda.py runs it there."""
    hidden, unembeddings, ids, coefficients, valid = case(bias=True, softcap=2.0)
    expected = weighted_head_loss(hidden, unembeddings, ids, coefficients, valid, objective)
    monkeypatch.setattr(module, "picks_rows", lambda device: False)
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 4 * 11 * 5)
    poisoned = [torch.where(valid[..., k, None], h, torch.nan) for k, h in enumerate(hidden)]
    counts = valid.sum((0, 1)).tolist() if counted else None
    found = weighted_head_loss(poisoned, unembeddings, ids, coefficients, valid, objective, valid_counts=counts)
    torch.testing.assert_close(found.loss, expected.loss)
    for name in ("token_losses", "overlap", "same_top"):
        torch.testing.assert_close(getattr(found.agreement, name), getattr(expected.agreement, name))
    torch.testing.assert_close(found.values, expected.values)
    wanted = leaves(hidden, unembeddings)
    for mine, reference in zip(
        torch.autograd.grad(found.loss, wanted), torch.autograd.grad(expected.loss, wanted), strict=True
    ):
        torch.testing.assert_close(mine, reference)
    if counted:
        few = weighted_head_loss(hidden, unembeddings, ids, coefficients, valid, objective, valid_counts=[1, 9, 9])
        assert few.loss.isnan(), "a number that is too small cannot go unnoticed"


def test_agreement_is_that_of_the_whole_distributions():
    hidden, unembeddings, ids, _, valid = case()
    found = head_agreement(hidden, unembeddings, ids, valid)
    p = [u.logits(h).softmax(-1).detach() for h, u in zip(hidden, unembeddings, strict=True)]
    for b, t, k in valid.nonzero().tolist():
        mine, target = p[k][b, t], p[0][b, t + k]
        assert float(found.overlap[b, t, k]) == pytest.approx(float(torch.minimum(mine, target).sum()))
        assert bool(found.same_top[b, t, k]) == (int(mine.argmax()) == int(target.argmax()))
        assert float(found.token_losses[b, t, k]) == pytest.approx(-float(mine[ids[b, t, k]].log()))
    for numbers in (found.overlap, found.same_top, found.token_losses):
        assert not numbers[~valid].any()
    torch.testing.assert_close(found.overlap[..., 0], valid[..., 0].double())


def test_what_counts_nowhere_may_be_nan_and_frozen_tensors_get_no_gradient():
    objective = HeadObjective("lk")
    hidden, unembeddings, ids, coefficients, valid = case()
    plain = weighted_head_loss(hidden, unembeddings, ids, coefficients, valid, objective)
    poisoned = [torch.where(valid[..., k, None], h, torch.nan) for k, h in enumerate(hidden)]
    torch.testing.assert_close(weighted_head_loss(poisoned, unembeddings, ids, coefficients, valid, objective).loss, plain.loss)
    frozen = [Unembedding(weight=unembeddings[0].weight.detach())] * 3
    states = [h.detach() for h in hidden[:2]] + hidden[2:]
    found = weighted_head_loss(states, frozen, ids, coefficients, valid, objective)
    torch.testing.assert_close(found.loss, plain.loss)
    only = torch.autograd.grad(found.loss, hidden[2])[0]
    torch.testing.assert_close(only, torch.autograd.grad(plain.loss, hidden[2])[0])
    with torch.no_grad():
        torch.testing.assert_close(
            weighted_head_loss(hidden, unembeddings, ids, coefficients, valid, objective).loss, plain.loss
        )


def test_memory_is_independent_of_the_horizon(monkeypatch):
    """Nothing of the size of all logits, nor of all positions of one head, is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 4 * 500 * 10)
    monkeypatch.setitem(module.plain._CHUNK_BYTES, "cpu", 4 * 500 * 10)
    largest = []
    for horizon in (2, 4):
        hidden, unembeddings, ids, coefficients, valid = case(b=1, s=100, h=horizon, d=2, v=500)
        with Largest() as watch:
            weighted_head_loss(hidden, unembeddings, ids, coefficients, valid, OBJECTIVES[2]).loss.backward()
        largest.append(watch.size)
    assert largest == [500 * 10] * 2

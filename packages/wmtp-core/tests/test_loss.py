"""The weighted cross entropy against a plain computation with all logits."""

import math

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.loss import Unembedding, token_losses, token_pass, weighted_cross_entropy
from wmtp.loss.torch_backend import plain as loss_module
from wmtp.loss.weights import weight_statistics


def plain(hidden, unembeddings, ids, coefficients):
    """Loops over predictions, one vector of logits at a time."""
    total = torch.zeros((), dtype=torch.float64)
    losses = torch.zeros(ids.shape, dtype=torch.float64)
    for k, u in enumerate(unembeddings):
        for i in range(ids.shape[0]):
            z = u.weight.double() @ hidden[k][i].double()
            if u.bias is not None:
                z = z + u.bias.double()
            z = z * u.scale
            if u.softcap is not None:
                z = u.softcap * torch.tanh(z / u.softcap)
            ce = -torch.log(torch.exp(z - z.max())[ids[i, k]] / torch.exp(z - z.max()).sum())
            losses[i, k] = ce.detach()
            total = total + coefficients[i, k] * ce
    return total, losses


def case(n=7, h=3, d=5, v=11, *, seed=0, bias=False, scale=1.0, softcap=None, shared=True, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    hidden = [new(n, d) for _ in range(h)]
    first = Unembedding(weight=new(v, d), bias=new(v) if bias else None, scale=scale, softcap=softcap)
    unembeddings = [first] * h if shared else [first, *(Unembedding(weight=new(v, d)) for _ in range(h - 1))]
    ids = torch.randint(v, (n, h), generator=g)
    valid = torch.rand(n, h, generator=g) > 0.3
    coefficients = torch.rand(n, h, generator=g, dtype=torch.float64) * valid * (torch.rand(n, h, generator=g) > 0.3)
    return hidden, unembeddings, ids, coefficients, valid


def leaves(hidden, unembeddings):
    found = {id(t): t for u in unembeddings for t in (u.weight, u.bias) if t is not None}
    return [*hidden, *found.values()]


@pytest.mark.parametrize("chunk", [1, 3, 10_000])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bias": True},
        {"scale": 0.5},
        {"softcap": 2.0},
        {"bias": True, "scale": 3.0, "softcap": 1.5},
        {"shared": False},
        {"n": 1},
    ],
    ids=str,
)
def test_equals_the_plain_loop_in_value_and_gradient(monkeypatch, kwargs, chunk):
    hidden, unembeddings, ids, coefficients, valid = case(**kwargs)
    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", 4 * 11 * chunk)
    ours, losses = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
    theirs, all_losses = plain(hidden, unembeddings, ids, coefficients)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses, all_losses * valid, rtol=1e-12, atol=1e-12)
    wanted = leaves(hidden, unembeddings)
    for mine, reference in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(token_losses(hidden, unembeddings, ids, valid), losses)


def test_gradient_equals_finite_differences():
    hidden, unembeddings, ids, coefficients, valid = case(n=3, h=2, d=3, v=4, bias=True, softcap=2.0)
    run = lambda: weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)[0] * 1.7
    wanted = leaves(hidden, unembeddings)
    for leaf, gradient in zip(wanted, torch.autograd.grad(run(), wanted), strict=True):
        flat = leaf.data.view(-1)
        for i in range(flat.numel()):
            flat[i] += 1e-6
            above = run().item()
            flat[i] -= 2e-6
            below = run().item()
            flat[i] += 1e-6
            assert gradient.view(-1)[i].item() == pytest.approx((above - below) / 2e-6, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kwargs", [{}, {"bias": True, "scale": 3.0, "softcap": 1.5}, {"shared": False}], ids=str)
def test_gradcheck(kwargs):
    hidden, unembeddings, ids, coefficients, valid = case(n=3, h=2, d=3, v=4, **kwargs)

    def run(*tensors):
        first = evolve(unembeddings[0], weight=tensors[2], bias=tensors[3] if "bias" in kwargs else None)
        second = first if unembeddings[1] is unembeddings[0] else evolve(first, weight=tensors[-1])
        return weighted_cross_entropy(tensors[:2], [first, second], ids, coefficients, valid)[0]

    assert torch.autograd.gradcheck(run, leaves(hidden, unembeddings))


def test_a_kept_graph_gives_the_same_gradient_again():
    hidden, unembeddings, ids, coefficients, valid = case()
    loss, _ = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
    wanted = leaves(hidden, unembeddings)
    first = torch.autograd.grad(2 * loss, wanted, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    again = torch.autograd.grad(loss, wanted, retain_graph=True)
    last = torch.autograd.grad(2 * loss, wanted)
    for gradients in (first, [2 * gradient for gradient in again], last):
        torch.testing.assert_close(gradients, type(gradients)(kept))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_derivative_is_refused():
    hidden, unembeddings, ids, coefficients, valid = case()
    loss, _ = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden[:1], create_graph=True)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 9), h=st.integers(1, 4), v=st.integers(2, 17), seed=st.integers(0, 1000))
def test_odd_sizes(n, h, v, seed):
    hidden, unembeddings, ids, coefficients, valid = case(n=n, h=h, v=v, seed=seed)
    ours, _ = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
    torch.testing.assert_close(ours, plain(hidden, unembeddings, ids, coefficients)[0], rtol=1e-11, atol=1e-12)


def test_predictions_that_do_not_count_are_never_read():
    hidden, unembeddings, ids, coefficients, valid = case()
    clean, _ = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
    poisoned = [torch.where(valid[:, k : k + 1], h.detach(), math.nan).requires_grad_() for k, h in enumerate(hidden)]
    loss, losses = weighted_cross_entropy(poisoned, unembeddings, ids, coefficients, valid)
    loss.backward()
    assert loss == clean
    assert losses.isfinite().all()
    assert all(h.grad.isfinite().all() for h in poisoned)
    assert unembeddings[0].weight.grad.isfinite().all()


def test_frozen_parts_get_no_gradient():
    hidden, unembeddings, ids, coefficients, valid = case()
    frozen = Unembedding(weight=unembeddings[0].weight.detach())
    loss, _ = weighted_cross_entropy([hidden[0].detach(), *hidden[1:]], [frozen] * 3, ids, coefficients, valid)
    loss.backward()
    assert hidden[0].grad is None
    assert hidden[1].grad.abs().sum() > 0


def test_bf16_is_close():
    hidden, unembeddings, ids, coefficients, valid = case(n=400, h=4, d=32, v=50, dtype=torch.bfloat16)
    loss, _ = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
    reference, _ = plain(hidden, unembeddings, ids, coefficients)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=5e-3, atol=0)
    (mine,) = torch.autograd.grad(loss, [unembeddings[0].weight])
    (exact,) = torch.autograd.grad(reference, [unembeddings[0].weight])
    assert (mine - exact).norm() / exact.norm() < 2e-2


def test_autocast_computes_the_products_in_bf16():
    hidden, unembeddings, ids, coefficients, valid = case(n=50, dtype=torch.float32)
    full, _ = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
    half.backward()
    assert full != half
    torch.testing.assert_close(full, half, rtol=2e-2, atol=0)
    assert unembeddings[0].weight.grad.dtype == torch.float32


def test_unembedding_logits_are_what_the_loss_uses():
    hidden, (u, *_), ids, coefficients, valid = case(bias=True, scale=0.7, softcap=3.0)
    every = torch.nn.functional.cross_entropy(u.logits(hidden[0]), ids[:, 0], reduction="none")
    torch.testing.assert_close(token_losses(hidden[:1], [u], ids[:, :1], valid[:, :1])[:, 0], every.detach() * valid[:, 0])


# --- what is not learned costs nothing


class Rows(TorchDispatchMode):
    """Counts the rows of each kind of product with the unembedding ``[V, D]``."""

    def __init__(self, v, d):
        super().__init__()
        self.v, self.d = v, d
        self.logits = self.hidden_gradient = self.weight_gradient = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            left, right = args[-2:]
            if right.shape == (self.d, self.v):
                self.logits += len(left)
            elif right.shape == (self.v, self.d):
                self.hidden_gradient += len(left)
            elif left.shape[0] == self.v:
                self.weight_gradient += len(right)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kwargs", [{}, {"bias": True, "softcap": 2.0}, {"shared": False}], ids=str)
def test_predictions_without_a_coefficient_cost_no_product_of_the_gradient(kwargs):
    hidden, unembeddings, ids, coefficients, valid = case(n=40, d=5, v=11, **kwargs)
    counted, asked = int((coefficients != 0).sum()), int(valid.sum())
    assert 0 < counted < asked
    with Rows(11, 5) as rows:
        loss, losses = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid)
        loss.backward()
    assert (rows.logits, rows.hidden_gradient, rows.weight_gradient) == (asked, counted, counted)
    gradients = [leaf.grad.clone() for leaf in leaves(hidden, unembeddings)]

    for leaf in leaves(hidden, unembeddings):
        leaf.grad = None
    with Rows(11, 5) as rows:
        again, few = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, coefficients != 0)
        again.backward()
    assert (rows.logits, rows.hidden_gradient, rows.weight_gradient) == (counted, counted, counted)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(few, torch.where(coefficients != 0, losses, 0.0))
    for leaf, gradient in zip(leaves(hidden, unembeddings), gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)

    with Rows(11, 5) as rows:
        token_losses(hidden, unembeddings, ids, valid)
    assert (rows.logits, rows.hidden_gradient, rows.weight_gradient) == (asked, 0, 0)


# --- entropy


@pytest.mark.parametrize("chunk", [1, 3, 10_000])
@pytest.mark.parametrize("top_k", [None, 2, 4, 50])
@pytest.mark.parametrize("kwargs", [{}, {"bias": True, "scale": 3.0, "softcap": 1.5}, {"shared": False}], ids=str)
def test_entropy_equals_the_plain_loop(monkeypatch, kwargs, top_k, chunk):
    hidden, unembeddings, ids, _, valid = case(**kwargs)
    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", 4 * 11 * chunk)
    found = token_pass(hidden, unembeddings, ids, valid, entropy=True, top_k=top_k)
    assert torch.equal(found.losses, token_losses(hidden, unembeddings, ids, valid))
    entropy = found.entropy
    assert not entropy.requires_grad
    for k, unembedding in enumerate(unembeddings):
        for i in range(len(ids)):
            p = sorted(unembedding.logits(hidden[k][i]).softmax(dim=0).tolist(), reverse=True)[:top_k]
            expected = -sum(x / sum(p) * math.log(x / sum(p)) for x in p) if valid[i, k] else 0.0
            assert entropy[i, k].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_entropy_of_a_sure_prediction_is_0_and_of_a_blind_one_log_v():
    weight = torch.eye(4) * 1000
    hidden, ids, valid = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    entropy = token_pass([hidden], [Unembedding(weight=weight)], ids, valid.bool(), entropy=True).entropy
    assert entropy[:, 0].tolist() == pytest.approx([0.0, math.log(4)])
    entropy = token_pass([hidden], [Unembedding(weight=weight)], ids, valid.bool(), entropy=True, top_k=2).entropy
    assert entropy[:, 0].tolist() == pytest.approx([0.0, math.log(2)])


def test_statistics_of_weights_are_of_valid_predictions():
    weights, valid = torch.tensor([[[2.0, 0.0], [3.0, 0.0]]]), torch.tensor([[[True, False], [True, False]]])
    found = {name: float(value) for name, value in weight_statistics(weights, valid).items()}
    assert found == pytest.approx(
        {"weight/mean": 2.5, "weight/std": 0.5, "weight/min": 2.0, "weight/max": 3.0}
        | {"weight/ess": 25 / 13, "weight/ess_share": 25 / 26, "weight/zero_share": 0.0}
    )

"""The loss as others use it: one function, inside compiled, checkpointed and sharded models."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from wmtp.loss import IGNORED, Unembedding, mtp_loss

N, H, D, V = 12, 3, 8, 19


def inputs(seed=0, dtype=torch.float64, share=0.7):
    g = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(2, N // 2, D, generator=g, dtype=dtype).requires_grad_() for _ in range(H)]
    weight = torch.randn(V, D, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (2, N // 2, H), generator=g)
    targets = torch.where(torch.rand(targets.shape, generator=g) < share, targets, IGNORED)
    return hidden, weight, targets


def plain(hidden, weight, targets, weights, alpha, z):
    """All logits at once."""
    total, count = 0.0, 0.0
    for k in range(H):
        losses = F.cross_entropy((hidden[k] @ weight.T).flatten(0, 1), targets[..., k].flatten(), reduction="none")
        valid = targets[..., k].flatten() != IGNORED
        w = weights[..., k].flatten() * alpha[k] * valid
        total = total + (losses * w).sum()
        count = count + (w.sum() if z == "sum_w" else (valid * alpha[k]).sum())
    return total / (count if isinstance(z, str) else z)


@pytest.mark.parametrize("z", ["sum_w", "valid", 7.5])
@pytest.mark.parametrize("alpha", [None, [1.0, 0.5, 0.25]])
def test_equals_all_logits_at_once(z, alpha):
    hidden, weight, targets = inputs()
    weights = torch.rand(targets.shape, dtype=torch.float64)
    weights[0, 2] = 0
    found = mtp_loss(hidden, weight, targets, weights=weights, head_weights=alpha, normalizer=z)
    expected = plain(hidden, weight, targets, weights, alpha or [1.0] * H, z)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    leaves = [*hidden, weight]
    ours, theirs = torch.autograd.grad(found.loss, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    valid = targets != IGNORED
    assert found.statistics["loss/head_2"] == pytest.approx(float(found.token_losses[..., 1].sum() / valid[..., 1].sum()))
    assert found.statistics["weight/zero_share"] == pytest.approx(float(((weights == 0) & valid).sum() / valid.sum()))


def test_a_function_of_the_token_losses():
    hidden, weight, targets = inputs()
    seen = []

    def best_half(losses):
        seen.append(losses)
        return (losses > losses[targets != IGNORED].median()).float()

    found = mtp_loss(hidden, weight, targets, weights=best_half)
    assert not seen[0].requires_grad
    again = mtp_loss(hidden, weight, targets, weights=best_half(seen[0]))
    leaves = [*hidden, weight]
    torch.testing.assert_close(found.loss, again.loss)
    torch.testing.assert_close(found.token_losses, again.token_losses)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaves), torch.autograd.grad(again.loss, leaves))
    assert found.weights.sum() == best_half(seen[0]).mul(targets != IGNORED).sum()


def test_a_function_may_change_the_losses_that_it_is_given():
    hidden, weight, targets = inputs()

    def in_place(losses):
        return losses.sub_(losses.mean()).gt_(0)

    found = mtp_loss(hidden, weight, targets, weights=in_place)
    again = mtp_loss(hidden, weight, targets, weights=lambda losses: (losses > losses.mean()).to(losses.dtype))
    torch.testing.assert_close(found.loss, again.loss)
    torch.testing.assert_close(found.token_losses, again.token_losses)


def test_weights_broadcast():
    hidden, weight, targets = inputs()
    by_position = torch.rand(2, N // 2, 1)
    one = mtp_loss(hidden, weight, targets, weights=by_position)
    other = mtp_loss(hidden, weight, targets, weights=by_position.expand(targets.shape))
    assert one.loss == other.loss


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weights": torch.full((2, N // 2, H), -1.0)}, ValueError, "weights: negative weights"),
        ({"weights": torch.full((2, N // 2, H), math.nan)}, ValueError, "weights: NaN or infinite"),
        ({"weights": torch.ones(2, N // 2, H, requires_grad=True)}, ValueError, "carry a gradient"),
        ({"weights": torch.ones(5, 1)}, TypeError, "does not broadcast"),
        ({"weights": 1.0}, TypeError, "a float is no tensor"),
        ({"weights": lambda losses: 1}, TypeError, "a int is no tensor"),
        ({"head_weights": [1.0]}, TypeError, "3 numbers are wanted"),
        ({"head_weights": [1.0, math.nan, 1.0]}, ValueError, "head_weights: numbers ≥ 0 are wanted"),
        ({"head_weights": [1.0, math.inf, 1.0]}, ValueError, "head_weights: numbers ≥ 0 are wanted"),
        ({"head_weights": [-1.0] * H}, ValueError, "head_weights: numbers ≥ 0 are wanted"),
        ({"normalizer": "sum-w"}, ValueError, "normalizer: 'sum-w' is none of 'sum_w', 'valid', 'per_position'"),
        ({"hidden": inputs()[0][:2]}, TypeError, "H = 3 heads; there are 2 hidden states"),
        ({"hidden": [torch.ones(2, 5, D)] * H}, TypeError, "do not fit each other"),
        ({"unembedding": torch.ones(V, D + 1)}, TypeError, "do not fit each other"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_named(change, error, text):
    hidden, weight, targets = inputs()
    arguments = {"hidden": hidden, "unembedding": weight, "targets": targets} | change
    with pytest.raises(error, match=text):
        mtp_loss(arguments.pop("hidden"), arguments.pop("unembedding"), arguments.pop("targets"), **arguments)


def test_no_rows_are_a_loss_of_0():
    hidden, weight, targets = [torch.zeros(0, 4, D, requires_grad=True)] * H, torch.randn(V, D), torch.zeros(0, 4, H)
    found = mtp_loss(hidden, weight, targets.long())
    found.loss.backward()
    assert float(found.loss.detach()) == 0
    assert hidden[0].grad is not None
    assert hidden[0].grad.shape == (0, 4, D)


def test_nothing_to_predict_is_a_loss_of_0():
    hidden, weight, targets = inputs(share=0.0)
    found = mtp_loss(hidden, weight, targets)
    found.loss.backward()
    assert found.loss == 0
    assert weight.grad.count_nonzero() == 0


# --- inside models


class Model(nn.Module):
    """Embedding, two layers that are heads, and an unembedding that may be the embedding."""

    def __init__(self, *, tied=False, bias=False, recomputed=False, two_phase=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.output = nn.Linear(D, V, bias=bias)
        if tied:
            self.output.weight = self.embed.weight
        self.recomputed, self.two_phase = recomputed, two_phase

    def loss(self, x, targets, weights):
        hidden = [layer(x) for layer in self.layers]
        unembedding = Unembedding(weight=self.output.weight, bias=self.output.bias)
        scores = weights
        weights = (lambda losses: scores * (losses > losses.mean())) if self.two_phase else weights
        return mtp_loss(hidden, unembedding, targets, weights=weights).loss

    def forward(self, tokens, targets, weights):
        x = self.embed(tokens)
        if self.recomputed:
            return checkpoint(self.loss, x, targets, weights, use_reentrant=self.recomputed == "reentrant")
        return self.loss(x, targets, weights)


def batch():
    g = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(V, (N,), generator=g), torch.randint(V, (N, 2), generator=g)
    return tokens, torch.where(torch.rand(N, 2, generator=g) < 0.8, targets, IGNORED), torch.rand(N, 2, generator=g)


def gradients(model, call=None):
    model.zero_grad()
    loss = (model if call is None else call)(*batch())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("recomputed", [True, "reentrant"])
def test_under_activation_checkpointing(recomputed):
    torch.testing.assert_close(gradients(Model(recomputed=recomputed)), gradients(Model()))


@pytest.mark.parametrize("kwargs", [{}, {"two_phase": True, "recomputed": True}], ids=str)
def test_in_a_compiled_model(kwargs):
    torch.compiler.reset()
    model = Model(tied=True, bias=True, **kwargs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled), gradients(model))


def test_tied_embeddings_get_both_gradients():
    model = Model(tied=True)
    tokens, targets, weights = batch()
    _, *ours = gradients(model)
    model.zero_grad()
    x = model.embed(tokens)
    losses = [F.cross_entropy(model.output(f(x)), targets[:, k], reduction="none") for k, f in enumerate(model.layers)]
    w = weights * (targets != IGNORED)
    ((torch.stack(losses, 1) * w).sum() / w.sum()).backward()
    torch.testing.assert_close(ours, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("frozen", ["output", "embed", "layers"])
def test_frozen_parts(frozen):
    whole = Model()
    gradients(whole)
    model = Model()
    getattr(model, frozen).requires_grad_(False)
    gradients(model)
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        if name.startswith(frozen):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad)


def test_a_low_rank_update_of_a_frozen_unembedding():
    """As docs/loss.md shows it: the update is added to the frozen weight."""
    hidden, weight, targets = inputs()
    frozen = weight.detach()
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, D), (V, 2)))
    whole = mtp_loss(hidden, frozen + 0.5 * b @ a, targets).loss
    beside = mtp_loss([torch.cat([h, h @ a.T], -1) for h in hidden], torch.cat([frozen, 0.5 * b], 1), targets).loss
    leaves = [*hidden, a, b]
    torch.testing.assert_close(torch.autograd.grad(whole, leaves), torch.autograd.grad(beside, leaves))


SHARDED = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, os.environ["HERE"])
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
import test_loss_mtp as t
plain = t.gradients(t.Model())
model = t.Model()
mesh = init_device_mesh("cpu", (1,))
for layer in model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
loss, *found = t.gradients(model)
torch.testing.assert_close([loss, *(g.full_tensor() for g in found)], plain)
try:
    t.mtp_loss([torch.ones(2, t.D)], model.output.weight, torch.zeros(2, 1, dtype=torch.long))
except TypeError as error:
    print(error)
dist.destroy_process_group()
"""


def test_under_fsdp_the_gathered_unembedding_is_a_plain_tensor(preloaded):
    done = preloaded.run(code=SHARDED, env=os.environ | {"HERE": os.path.dirname(__file__)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "this is a DTensor" in done.stdout

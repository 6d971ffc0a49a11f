"""One optimizer step against a plain reference in loops, and the invariances that every algorithm must have."""

import contextlib
import math

import pytest
import torch
from attrs import evolve
from one_step import (
    Baseline,
    ByPrediction,
    ByToken,
    HardHalf,
    Unsure,
    Valued,
    assert_same,
    gradients,
    make_batch,
    make_model,
    reference,
)

from wmtp.data.batch import PADDING
from wmtp.trainers import Trainer

TRAINERS = [Baseline, ByToken, ByPrediction, HardHalf, Valued, Unsure]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalizer", ["sum_w", "valid", "per_position"])
@pytest.mark.parametrize(
    ("trainer", "weight_of"),
    [
        (Baseline, lambda b, t, k, token: 1.0),
        (ByToken, lambda b, t, k, token: float(token % 5)),
        (ByPrediction, lambda b, t, k, token: float(token % 4 + k)),
    ],
)
def test_loss_and_gradient_equal_the_loops(packed, normalizer, trainer, weight_of):
    model = make_model(decay=0.6)
    batch = make_batch(packed=packed)
    output, ours = gradients(model, trainer(), batch, normalizer=normalizer)
    model.zero_grad(set_to_none=True)
    expected = reference(model, batch, weight_of, [1.0, 0.6, 0.36], normalizer)
    expected.backward()
    torch.testing.assert_close(output.loss.double(), expected.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("normalizer", ["sum_w", "valid"])
@pytest.mark.parametrize("objective", ["kl", "tv", "lk"])
def test_objectives_of_heads_equal_the_loops(objective, normalizer):
    model, batch = make_model(decay=0.6, objective=objective), make_batch(packed=True)
    output, ours = gradients(model, ByPrediction(), batch, normalizer=normalizer)
    model.zero_grad(set_to_none=True)
    expected = reference(model, batch, lambda b, t, k, token: float(token % 4 + k), [1.0, 0.6, 0.36], normalizer)
    expected.backward()
    torch.testing.assert_close(output.loss.double(), expected.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("trainer", [ByPrediction, HardHalf, Valued])
def test_with_an_objective_neither_splitting_nor_padding_changes_anything(trainer):
    model, batch = make_model(objective="lk"), make_batch(packed=True)
    whole = gradients(model, trainer(), batch)
    assert {"objective/head_2", "acceptance/head_3", "top1/head_2"} <= whole[0].metrics.keys()
    for other in (
        gradients(model, trainer(), batch, micro=2),
        gradients(model, trainer(), make_batch(packed=True, pad_columns=5, pad_rows=2)),
    ):
        assert_same(whole, other)
        for name, value in whole[0].metrics.items():
            torch.testing.assert_close(torch.as_tensor(other[0].metrics[name]), torch.as_tensor(value), equal_nan=True)


def test_heads_that_learn_nothing_report_their_objective_all_the_same():
    model, batch = make_model(objective="kl"), make_batch(packed=True)
    learning = gradients(model, Baseline(), batch)[0]
    model.extra_heads.requires_grad_(False)
    model.base.requires_grad_(False)
    model.anatomy.embedding.requires_grad_(True)
    frozen = gradients(model, Baseline(), batch)[0]
    torch.testing.assert_close(frozen.loss, learning.loss)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_splitting_into_micro_batches_changes_nothing(trainer, packed):
    model, batch = make_model(), make_batch(packed=packed)
    whole = gradients(model, trainer(), batch)
    for micro in (1, 2, 4):
        assert_same(whole, gradients(model, trainer(), batch, micro=micro))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_padding_changes_nothing(trainer, packed):
    model = make_model()
    plain = gradients(model, trainer(), make_batch(packed=packed))
    assert_same(plain, gradients(model, trainer(), make_batch(packed=packed, pad_columns=5, pad_rows=2)))


@pytest.mark.parametrize("micro", [2, 99])
@pytest.mark.parametrize("top_k", [None, 3])
def test_entropy_is_that_of_the_models_predictions(micro, top_k):
    seen = []

    class Looking(Trainer):
        needs_entropy = True
        entropy_top_k = top_k

        def token_weights(self, view):
            seen.append((view.entropy, view.targets.valid))
            return view.uniform()

    model, batch = make_model(), make_batch(packed=True)
    gradients(model, Looking(), batch, micro=micro)
    entropy, valid = seen[0]
    output = model(batch.input_ids, batch.position, True)
    for k in range(1, 4):
        p = model.logits(output, k).detach().softmax(dim=-1).sort(descending=True).values[..., :top_k]
        p = p / p.sum(dim=-1, keepdim=True)
        expected = torch.where(valid[..., k - 1], -(p * p.log()).sum(dim=-1), 0.0)
        torch.testing.assert_close(entropy[..., k - 1], expected)


def test_constant_weights_equal_the_baseline():
    class Constant(Trainer):
        def token_weights(self, view):
            return torch.full(view.batch.input_ids.shape, 0.37)

    model, batch = make_model(), make_batch(packed=True)
    assert_same(gradients(model, Baseline(), batch), gradients(model, Constant(), batch), tolerance=1e-6)


class OddDocuments(Trainer):
    """Learns every other document; the rest is none of its business."""

    def eligible(self, view):
        return view.targets.valid & (view.batch.document % 2 == 1).unsqueeze(-1)

    def token_weights(self, view):
        return torch.where(self.eligible(view), (view.targets.ids % 4 + 1.0), 0.0)


@pytest.mark.parametrize("normalizer", ["sum_w", "valid", "per_position"])
def test_what_a_stage_may_not_learn_counts_neither_in_z_nor_in_statistics(normalizer):
    model, batch = make_model(), make_batch(packed=True)
    mixed, found = gradients(model, OddDocuments(), batch, normalizer=normalizer)
    odd = evolve(batch, loss_mask=batch.loss_mask & (batch.document % 2 == 1))

    class All(Trainer):
        def token_weights(self, view):
            return view.targets.ids % 4 + 1.0

    alone, expected = gradients(model, All(), odd, normalizer=normalizer)
    assert_same((mixed, found), (alone, expected), tolerance=1e-6)
    for name, value in alone.metrics.items():
        torch.testing.assert_close(torch.as_tensor(mixed.metrics[name]), torch.as_tensor(value), msg=name)


def test_a_token_weight_has_an_effect_only_through_its_own_token():
    """Doubling one token's weight moves the loss towards that token's losses; per_position would cancel it."""
    model, batch = make_model(), make_batch(packed=False)

    class Twice(Trainer):
        def token_weights(self, view):
            return 1.0 + (view.batch.input_ids == 5)

    base, twice = gradients(model, Baseline(), batch)[0].loss, gradients(model, Twice(), batch)[0].loss
    expected = reference(model, batch, lambda b, t, k, token: 1.0 + (token == 5), [1.0] * 3)
    assert not torch.isclose(base, twice)
    torch.testing.assert_close(twice.double(), expected.detach(), rtol=1e-6, atol=0)


def test_no_gradient_flows_through_what_the_trainer_observed():
    class Leaky(Valued):
        def token_weights(self, view):
            assert not view.observations["value"].requires_grad
            return super().token_weights(view)

        def auxiliary_losses(self, view):
            return {}

    model, batch = make_model(), make_batch(packed=False)
    _, found = gradients(model, Leaky(), batch)
    assert not any(name.startswith("value.") for name in found)


def test_auxiliary_loss_equals_plain_autograd():
    model, batch, trainer = make_model(), make_batch(packed=True), Valued()
    output, found = gradients(model, trainer, batch, micro=2)
    trunk = model(batch.input_ids, batch.position, True).trunk.detach()
    value = trainer.head(trunk).squeeze(-1)[batch.document != PADDING]
    expected = ((value - value.mean() - 1) ** 2).mean() + value.max()
    gradient = torch.autograd.grad(expected, [trainer.head.weight, trainer.head.bias])
    torch.testing.assert_close(found["value.weight"], gradient[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["value.bias"], gradient[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(output.metrics["auxiliary/value"], expected.detach())


def test_a_step_without_weight_may_teach_by_its_auxiliary_losses():
    class Zero(Valued):
        def token_weights(self, view):
            return torch.zeros(view.batch.input_ids.shape)

    output, found = gradients(make_model(), Zero(), make_batch(packed=False))
    assert int(output.bad_weights) == 0
    assert found["value.weight"].abs().max() > 0


def test_values_at_places_that_do_not_count_are_never_looked_at():
    class Poisoned(Trainer):
        def token_weights(self, view):
            return torch.where(view.targets.valid, 1.0, math.nan)

    model, batch = make_model(), make_batch(packed=True)
    assert_same(gradients(model, Baseline(), batch), gradients(model, Poisoned(), batch))


def test_detached_heads_leave_the_trunk_the_gradient_of_head_one():
    detached = make_model(trunk_gradient="detach")
    batch = make_batch(packed=False)
    _, found = gradients(detached, Baseline(), batch)
    _, joint = gradients(make_model(), Baseline(), batch)
    name = "base.model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(found[name], joint[name])
    assert any(key.startswith("extra_heads.") for key in found)


def test_evaluation_equals_plain_means_whatever_the_batches():
    from wmtp.training.evaluate import evaluate

    model, batch = make_model(decay=0.5), make_batch(packed=True)
    whole = evaluate(model, [batch], torch.device("cpu"), contextlib.nullcontext)
    pieces = [evolve(batch.rows(i, i + 1)) for i in range(5)]
    parts = evaluate(model, pieces, torch.device("cpu"), contextlib.nullcontext)
    expected = reference(model, batch, lambda *_: 1.0, [1.0, 0.5, 0.25])
    assert whole["eval/loss"] == pytest.approx(float(expected), rel=1e-6)
    assert parts == pytest.approx(whole, rel=1e-9)


def test_evaluation_counts_the_drafts_that_head_one_would_accept():
    from wmtp.training.evaluate import evaluate

    model, batch = make_model(), make_batch(packed=True)
    found = evaluate(model, [batch], torch.device("cpu"), contextlib.nullcontext)
    output = model(batch.input_ids, batch.position, True)
    tops = [model.logits(output, k).argmax(-1) for k in range(1, 4)]
    depths = {1: [], 2: []}
    for b in range(5):
        for t in range(14):
            agreed = True
            for k in (2, 3):
                places = range(t + 1, t + k + 1)
                if t + k >= 14 or not all(
                    batch.document[b, j] == batch.document[b, t] and batch.loss_mask[b, j] for j in places
                ):
                    break
                agreed &= bool(tops[k - 1][b, t] == tops[0][b, t + k - 1])
                depths[k - 1].append(agreed)
    shares = {d: sum(agreed) / len(agreed) for d, agreed in depths.items()}
    assert {d: found[f"eval/accepted/depth_{d}"] for d in depths} == pytest.approx(shares)
    tokens = steps = 0
    learned = lambda b, t: t < 13 and bool(batch.document[b, t] == batch.document[b, t + 1] and batch.loss_mask[b, t + 1])
    for b in range(5):
        t = 0
        while t < 14:  # along each text, from where the last step ended
            begins = learned(b, t) and not (t and learned(b, t - 1))
            while begins and learned(b, t) and learned(b, t + 1):
                accepted = 0
                while accepted < 2 and learned(b, t + accepted + 1):
                    if tops[accepted + 1][b, t] != tops[0][b, t + accepted + 1]:
                        break
                    accepted += 1
                steps, tokens = steps + 1, tokens + accepted + learned(b, t + accepted + 1)
                t += accepted + 1
            t += 1
    assert 0 < steps < tokens
    assert found["eval/tokens_per_forward"] == pytest.approx(tokens / steps)
    assert 0 < found["eval/acceptance/head_2"] < 1

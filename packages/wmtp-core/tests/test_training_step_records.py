"""Logged and recorded numbers of a step are those that its loss was made of."""

import pytest
import torch
from one_step import ByToken, gradients, make_batch, make_model, step_loss

from wmtp.data.batch import PADDING
from wmtp.trainers import Stage, Trainer


def test_logged_statistics_equal_plain_ones():
    model, batch = make_model(), make_batch(packed=True)
    output, _ = gradients(model, ByToken(), batch)
    heads = {k: [] for k in (1, 2, 3)}
    rows, length = batch.input_ids.shape
    found = model(batch.input_ids, batch.position, True)
    logits = {k: model.logits(found, k) for k in heads}
    for b in range(rows):
        for t in range(length):
            for k in heads:
                j = t + k
                if j < length and batch.document[b, t] == batch.document[b, j] != PADDING and batch.loss_mask[b, j]:
                    ce = -torch.log_softmax(logits[k][b, t], -1)[batch.input_ids[b, j]]
                    heads[k].append((float(batch.input_ids[b, j] % 5), ce.item()))
    w = torch.tensor([weight for values in heads.values() for weight, _ in values], dtype=torch.float64)
    m = {name: float(value) for name, value in output.metrics.items()}
    for k, values in heads.items():
        assert m[f"loss/head_{k}"] == pytest.approx(sum(ce for _, ce in values) / len(values), rel=1e-6)
        weighted = sum(a * ce for a, ce in values) / sum(a for a, _ in values)
        assert m[f"weighted_loss/head_{k}"] == pytest.approx(weighted, rel=1e-6)
    assert m["weight/mean"] == pytest.approx(w.mean())
    assert m["weight/std"] == pytest.approx(w.std(correction=0))
    assert (m["weight/min"], m["weight/max"]) == (w.min(), w.max())
    assert m["weight/ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert m["weight/zero_share"] == pytest.approx((w == 0).double().mean())


class Detailed(Trainer):
    """Weights that differ, and details of both shapes, one of them with a gradient."""

    def observe(self, view):
        return {"norm": view.trunk.norm(dim=-1)}

    def token_weights(self, view):
        self.seen = view
        return view.observations["norm"] + 1.0

    def token_details(self, view):
        assert view is self.seen, "the view of the weights"
        return {"norm": view.observations["norm"], "ids": view.targets.ids.float().requires_grad_()}


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_recorded_of_tokens_is_what_the_loss_was_made_of(packed):
    batch = make_batch(packed=packed)
    recorded = []
    for micro in (99, 2):
        model, trainer = make_model(), Detailed()
        loss = step_loss(model, trainer, micro=micro)
        plain, _ = gradients(make_model(), Detailed(), batch, micro=micro)
        output = loss(batch, 3, Stage(), histogram=True, tokens=True)
        torch.testing.assert_close(output.loss, plain.loss, rtol=0, atol=0)
        assert (plain.tokens, plain.weight_histogram) == (None, None)
        record = output.tokens
        valid, weights, losses = record.valid, record.weights, record.losses
        assert not any(value.requires_grad for value in (weights, losses))
        expected = float((weights * losses).sum() / weights.sum())
        assert float(output.loss) == pytest.approx(expected, rel=1e-6)
        norm = record.details["norm"]
        for row, place, head in valid.nonzero().tolist():
            assert float(weights[row, place, head]) == pytest.approx(float(norm[row, place + head + 1]) + 1.0)
        assert int(output.weight_histogram.sum()) == int(valid.sum())
        recorded.append(record)
    torch.testing.assert_close(recorded[0].losses, recorded[1].losses)
    torch.testing.assert_close(recorded[0].weights, recorded[1].weights)


def test_a_stage_without_weights_records_none():
    class Unasked(Trainer):
        def observe(self, view):
            return {"norm": view.trunk.norm(dim=-1)}

        def auxiliary_losses(self, view):
            return {"norm": view.observations["norm"].mean()}

        def token_weights(self, view):
            raise AssertionError

    output = step_loss(make_model(), Unasked())(
        make_batch(packed=True), 0, Stage(model_loss=False), histogram=True, tokens=True
    )
    assert output.weight_histogram is None
    assert output.tokens.weights is None
    assert output.tokens.details.keys() == {"norm"}
    assert (output.tokens.losses[output.tokens.valid] > 0).all()

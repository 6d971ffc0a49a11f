"""Numbers that a trainer makes of logits, chunk by chunk, against float64 loops over single predictions."""

import math

import pytest
import torch
from one_step import VOCAB, make_batch, make_model, step_loss

from wmtp.data.batch import align_targets
from wmtp.errors import PluginError
from wmtp.testing.steps import make_view, random_step
from wmtp.trainers import Stage, Trainer

CHUNK = 3


class ByLogits(Trainer):
    """Margin, a hit, and the divergence from another model; the margin becomes the weight."""

    def __init__(self, other):
        self._other = other

    def observe(self, view):
        other = self._other(view.batch.input_ids, view.batch.position, view.packed)

        def kl(chunk):
            assert chunk.logits.shape == (len(chunk.ids), VOCAB)
            assert len(chunk.ids) <= CHUNK, "more logits than a chunk"
            assert not chunk.logits.requires_grad
            theirs = self._other.unembedding(chunk.head).logits(other.hidden[chunk.head - 1].flatten(0, 1)[chunk.places])
            own = chunk.logits.log_softmax(-1)
            return (own.exp() * (own - theirs.log_softmax(-1))).sum(-1)

        def margin(chunk):
            target = chunk.logits.gather(1, chunk.ids[:, None])
            return (target - chunk.logits.scatter(1, chunk.ids[:, None], -math.inf).amax(1, keepdim=True))[:, 0]

        return {
            "kl": view.each_prediction(kl, chunk=CHUNK),
            "margin": view.each_prediction(margin, chunk=CHUNK),
            "hit": view.each_prediction(lambda chunk: chunk.logits.argmax(-1) == chunk.ids, chunk=CHUNK),
        }

    def token_weights(self, view):
        self.seen = view.observations
        return torch.exp(-view.observations["margin"])


def by_loops(model, other, batch):
    """Each number from the logits of one prediction at a time, without torch's softmax."""
    targets = align_targets(batch, model.horizon)
    found = {name: torch.zeros(targets.ids.shape, dtype=torch.float64) for name in ("kl", "margin", "hit")}
    outputs = [m(batch.input_ids, batch.position, batch.packed) for m in (model, other)]
    for b, t, k in targets.valid.nonzero().tolist():
        own, theirs = (
            [float(x) for x in m.unembedding(k + 1).logits(out.hidden[k][b, t])]
            for m, out in zip((model, other), outputs, strict=True)
        )
        target = int(targets.ids[b, t, k])
        p, q = ([math.exp(x) / sum(map(math.exp, logits)) for x in logits] for logits in (own, theirs))
        found["kl"][b, t, k] = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        found["margin"][b, t, k] = own[target] - max(x for v, x in enumerate(own) if v != target)
        found["hit"][b, t, k] = float(own.index(max(own)) == target)
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("micro", "padding"), [(99, (0, 0)), (2, (0, 0)), (1, (3, 2))])
def test_numbers_of_predictions_are_those_of_loops(packed, micro, padding):
    model, other = make_model(), make_model(init="copy").requires_grad_(False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    plain = make_batch(packed=packed)
    rows, length = plain.input_ids.shape
    with torch.no_grad():
        expected = by_loops(model, other, plain)
    trainer = ByLogits(other)
    batch = make_batch(packed=packed, pad_columns=padding[0], pad_rows=padding[1])
    output = step_loss(model, trainer, micro)(batch, 0, Stage())
    for name, values in expected.items():
        seen = trainer.seen[name]
        torch.testing.assert_close(seen[:rows, :length], values, rtol=1e-9, atol=1e-9)
        assert not seen[rows:].any()
        assert not seen[:, length:].any()
    assert torch.isfinite(output.loss)


def test_the_step_is_the_same_for_every_micro_batch_size():
    gradients = []
    for micro in (99, 2, 1):
        model, other = make_model(), make_model().requires_grad_(False)
        step_loss(model, ByLogits(other), micro)(make_batch(packed=True), 0, Stage())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (lambda chunk: chunk.logits, r"gave \[5, 61\], not \[n\]"),
        (lambda chunk: None, r"gave NoneType, not \[n\]"),
        (lambda chunk: chunk.ids.sum(), r"a chunk of n = 5 places gave \[\], not \[n\]"),
    ],
)
def test_a_number_of_another_shape_is_refused(number, said):
    class Wrong(Trainer):
        def observe(self, view):
            return {"x": view.each_prediction(number, chunk=5)}

    with pytest.raises(PluginError, match=said):
        make_view(Wrong(), random_step(0, packed=False))

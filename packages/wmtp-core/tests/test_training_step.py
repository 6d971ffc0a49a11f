"""One optimizer step against a plain reference in loops, and the invariances that every algorithm must have."""

import contextlib
import math

import pytest
import torch
from attrs import evolve
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import PADDING, Batch, Document
from wmtp.errors import PluginError
from wmtp.loss import plain as loss_module
from wmtp.loss import weighted_cross_entropy
from wmtp.models.build import build_model
from wmtp.models.config import ScratchModel
from wmtp.training import Stage, Trainer, TrainerSetup
from wmtp.training import step as step_module
from wmtp.training.stages import StagePlan, apply_stage
from wmtp.training.step import StepLoss

VOCAB = 23
SMALL = ScratchModel(vocab_size=VOCAB, hidden_size=16, layers=2, attention_heads=2, max_positions=64, intermediate_size=24)


def make_model(**heads):
    loaded = SMALL.build().load(None, dtype=torch.float64, seed=1)
    model = build_model(loaded, HeadsConfig(**{"horizon": 3, "init": "random"} | heads), 5).double().eval()
    with torch.no_grad():  # away from the symmetric start, where many mistakes do not show
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def make_batch(rows=5, length=14, *, packed, seed=0, pad_columns=0, pad_rows=0):
    """Ragged rows: documents of random lengths, with a prompt at the start of each, and padding at the end of the row."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, length), generator=g)
    document = torch.full((rows, length), PADDING)
    position = torch.zeros((rows, length), dtype=torch.int64)
    learn = torch.zeros((rows, length), dtype=torch.bool)
    documents = []
    for row in range(rows):
        at = 0
        for _ in range(3 if packed else 1):
            size = (
                int(torch.randint(1, length - 2 if not packed else 6, (1,), generator=g))
                if row
                else length
                if not packed
                else 4
            )
            size = min(size, length - at)
            if size < 1:
                break
            prompt = int(torch.randint(0, size, (1,), generator=g))
            document[row, at : at + size] = len(documents)
            position[row, at : at + size] = torch.arange(size)
            learn[row, at + prompt : at + size] = True
            documents.append(Document(index=len(documents), start=0, id=f"d{len(documents)}", group=f"g{len(documents) // 2}"))
            at += size
    pad = lambda t, value: torch.nn.functional.pad(t, (0, pad_columns, 0, pad_rows), value=value)
    return Batch(
        input_ids=pad(ids, 7),
        document=pad(document, PADDING),
        position=pad(position, 0),
        learn=pad(learn, False),
        documents=documents,
    )


def step_loss(model, trainer, micro=99, normalizer="sum_w"):
    trainer.setup(
        TrainerSetup(
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            horizon=model.horizon,
            device=torch.device("cpu"),
            seed=0,
            tokenizer=None,
            model=None,
            token_numbers=None,
        )
    )
    return StepLoss(
        model=model,
        trainer=trainer,
        trainer_name="trainer 'mine' (mine 1.0)",
        micro_batch_size=micro,
        normalizer=normalizer,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        seed=4,
    )


def gradients(model, trainer, batch, *, stage=None, **kwargs):
    modules = {}
    model.zero_grad(set_to_none=True)
    loss = step_loss(model, trainer, **kwargs)
    modules = dict(trainer.modules())
    for module in modules.values():
        module.double().zero_grad(set_to_none=True)
    output = loss(batch, 3, stage or Stage())
    named = [*model.named_parameters(), *((f"{n}.{k}", p) for n, m in modules.items() for k, p in m.named_parameters())]
    return output, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(left, right, tolerance=1e-9):
    (out_a, grads_a), (out_b, grads_b) = left, right
    torch.testing.assert_close(out_a.loss, out_b.loss, rtol=1e-6, atol=0)  # it is added in fp32
    assert grads_a.keys() == grads_b.keys()
    for name in grads_a:
        torch.testing.assert_close(
            grads_a[name], grads_b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class Baseline(Trainer):
    pass


class ByToken(Trainer):
    """A weight for each token: far from constant, zero for some."""

    def token_weights(self, view):
        return (view.batch.input_ids % 5).float()


class ByPrediction(Trainer):
    def token_weights(self, view):
        rows, length, horizon = view.targets.ids.shape
        k = torch.arange(1, horizon + 1)
        return (view.targets.ids % 4 + k).float()


class HardHalf(Trainer):
    """Keeps the half of the valid predictions that are hardest: needs the losses of the whole batch."""

    needs_token_loss = True

    def token_weights(self, view):
        valid = view.targets.valid
        return (view.token_loss >= view.token_loss[valid].median()).float()


class Valued(Trainer):
    """A value head whose loss whitens over the whole batch, and whose values weigh the tokens."""

    def setup(self, setup):
        torch.manual_seed(0)
        self.head = torch.nn.Linear(setup.hidden_size, 1).double()

    def modules(self):
        return {"value": self.head}

    def observe(self, view):
        return {"value": self.head(view.trunk.detach()).squeeze(-1)}

    def token_weights(self, view):
        value, real = view.observations["value"], view.batch.document != PADDING
        z = (value - value[real].mean()) / value[real].std()
        return torch.exp(z).clamp(0.1, 3)

    def auxiliary_losses(self, view):
        value, real = view.observations["value"], view.batch.document != PADDING
        return {"value": ((value[real] - value[real].mean() - 1) ** 2).mean() + value[real].max()}


class Unsure(Trainer):
    """Weighs by the entropy of the two most probable tokens; learns nothing of the rest."""

    needs_entropy = True
    entropy_top_k = 2

    def token_weights(self, view):
        assert view.token_loss is None
        return torch.where(view.entropy > 0.5, view.entropy, 0.0)


TRAINERS = [Baseline, ByToken, ByPrediction, HardHalf, Valued, Unsure]


def reference(model, batch, weight_of, alpha, normalizer="sum_w"):
    """Σ α w CE / Z by loops over rows, positions and heads."""
    output = model(batch.input_ids, batch.position, batch.packed)
    logits = [model.logits(output, k) for k in range(1, model.horizon + 1)]
    rows, length = batch.input_ids.shape
    terms = []
    for b in range(rows):
        for t in range(length):
            for k in range(1, model.horizon + 1):
                j = t + k
                if batch.document[b, t] == PADDING or j >= length:
                    continue
                if batch.document[b, j] != batch.document[b, t] or not batch.learn[b, j]:
                    continue
                ce = -torch.log_softmax(logits[k - 1][b, t], -1)[batch.input_ids[b, j]]
                terms.append((b, t, k, alpha[k - 1], weight_of(b, t, k, int(batch.input_ids[b, j])), ce))
    if normalizer == "per_position":
        places = {}
        for b, t, _, a, w, ce in terms:
            top, bottom = places.get((b, t), (0.0, 0.0))
            places[b, t] = (top + a * w * ce, bottom + a * w)
        alive = [(top, bottom) for top, bottom in places.values() if bottom > 0]
        return sum(top / bottom for top, bottom in alive) / len(alive)
    z = sum(a * (w if normalizer == "sum_w" else 1.0) for _, _, _, a, w, _ in terms)
    return sum(a * w * ce for _, _, _, a, w, ce in terms) / z


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

    model, batch = make_model(), make_batch(packed=True)
    gradients(model, Looking(), batch, micro=micro)
    entropy, valid = seen[0]
    output = model(batch.input_ids, batch.position, True)
    for k in range(1, 4):
        p = model.logits(output, k).detach().softmax(dim=-1).sort(descending=True).values[..., :top_k]
        p = p / p.sum(dim=-1, keepdim=True)
        expected = torch.where(valid[..., k - 1], -(p * p.log()).sum(dim=-1), 0.0)
        torch.testing.assert_close(entropy[..., k - 1], expected)


@pytest.mark.parametrize("micro", [2, 99])
def test_what_is_known_of_the_losses_is_not_computed_again(monkeypatch, micro):
    """With the losses known, the second pass makes logits of the predictions that teach something, and all are logged."""
    computed, rows = [], []
    logits = loss_module._logits
    monkeypatch.setattr(loss_module, "_logits", lambda hidden, *rest: rows.append(len(hidden)) or logits(hidden, *rest))

    def counting(hidden, unembeddings, ids, coefficients, valid, **told):
        rows.clear()
        found = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid, **told)
        computed.append((sum(rows), int((coefficients != 0).sum())))
        return found

    monkeypatch.setattr(step_module, "weighted_cross_entropy", counting)
    model, batch = make_model(), make_batch(packed=True)
    output, _ = gradients(model, HardHalf(), batch, micro=micro)
    assert all(asked == taught > 0 for asked, taught in computed)
    baseline, _ = gradients(model, Baseline(), batch, micro=micro)
    for k in (1, 2, 3):
        torch.testing.assert_close(output.metrics[f"loss/head_{k}"], baseline.metrics[f"loss/head_{k}"])


@pytest.mark.parametrize(("auxiliary", "calls"), [(False, [2, 2, 1]), (True, [2, 2, 1, 2, 2, 1])])
def test_a_trainer_observes_again_only_for_a_gradient(auxiliary, calls):
    rows = []

    class Watching(Valued):
        def observe(self, view):
            rows.append(len(view.trunk))
            assert view.packed
            return super().observe(view)

        def auxiliary_losses(self, view):
            return super().auxiliary_losses(view) if auxiliary else {}

    gradients(make_model(), Watching(), make_batch(packed=True), micro=2)
    assert rows == calls


def test_constant_weights_equal_the_baseline():
    class Constant(Trainer):
        def token_weights(self, view):
            return torch.full(view.batch.input_ids.shape, 0.37)

    model, batch = make_model(), make_batch(packed=True)
    assert_same(gradients(model, Baseline(), batch), gradients(model, Constant(), batch), tolerance=1e-6)


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


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda v: v.batch.input_ids[:, :3].float(), "shape [5, 3]; it must be [B, S] = [5, 14]"),
        (lambda v: torch.ones(v.batch.input_ids.shape, requires_grad=True), "carry a gradient"),
        (lambda v: v.batch.input_ids, "torch.int64; weights are floating-point"),
        (lambda v: 1.0, "returned a float"),
    ],
)
def test_weights_of_the_wrong_form_are_an_error_that_names_the_trainer(returned, words):
    class Bad(Trainer):
        def token_weights(self, view):
            return returned(view)

    with pytest.raises(PluginError) as error:
        gradients(make_model(), Bad(), make_batch(packed=False))
    assert words in str(error.value)
    assert "trainer 'mine' (mine 1.0)" in str(error.value)


@pytest.mark.parametrize(
    ("method", "returned", "words"),
    [
        ("observe", None, "observe returned a NoneType, not tensors by name"),
        ("observe", {"value": [1.0]}, "observe returned a list as 'value', not a tensor"),
        ("observe", {"value": torch.zeros(3)}, "observe returned 'value' of shape [3]"),
        ("auxiliary_losses", {"value": 1.0}, "auxiliary_losses returned a float as 'value', not a tensor"),
        ("auxiliary_losses", {"value": torch.zeros(2)}, "auxiliary loss 'value' has shape [2]; it must be a scalar"),
    ],
)
def test_other_returns_of_the_wrong_form_name_the_trainer_too(method, returned, words):
    bad = type("Bad", (Trainer,), {method: lambda self, view: returned})
    with pytest.raises(PluginError) as error:
        gradients(make_model(), bad(), make_batch(packed=False))
    assert words in str(error.value)
    assert "trainer 'mine' (mine 1.0)" in str(error.value)


@pytest.mark.parametrize(("value", "code"), [(math.nan, 1), (math.inf, 1), (-1.0, 2), (0.0, 3), (1.0, 0)])
def test_weights_with_bad_values_are_found_without_reading_the_device(value, code):
    class Bad(Trainer):
        def token_weights(self, view):
            return torch.full(view.batch.input_ids.shape, value)

    output, _ = gradients(make_model(), Bad(), make_batch(packed=False))
    assert int(output.bad_weights) == code


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
                if j < length and batch.document[b, t] == batch.document[b, j] != PADDING and batch.learn[b, j]:
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


def test_never_more_than_a_chunk_of_logits(monkeypatch):
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                # [V, D] and its transpose are the unembedding itself
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.ndim > 1
                    and tensor.shape[-1] == VOCAB
                    and 16 not in tensor.shape
                ):
                    self.seen = max(self.seen, tensor.numel())
            return out

    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", 4 * VOCAB * 2)
    model, batch = make_model(), make_batch(packed=True)
    for trainer in (Baseline(), HardHalf()):
        with Largest() as largest:
            gradients(model, trainer, batch)
        assert 0 < largest.seen <= 2 * VOCAB


def test_detached_heads_leave_the_trunk_the_gradient_of_head_one():
    detached = make_model(trunk_gradient="detach")
    batch = make_batch(packed=False)
    _, found = gradients(detached, Baseline(), batch)
    _, joint = gradients(make_model(), Baseline(), batch)
    name = "base.model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(found[name], joint[name])
    assert any(key.startswith("extra_heads.") for key in found)


def test_a_stage_has_no_negative_length():
    with pytest.raises(PluginError, match="stage 'a' has a negative number of steps"):
        StagePlan.make([Stage(name="a", steps=-3), Stage()], warmup_steps=0, total_steps=5, trainer_name="x")


def test_warm_up_teaches_the_heads_and_nothing_else():
    model, batch = make_model(), make_batch(packed=False)
    plan = StagePlan.make([Stage()], warmup_steps=2, total_steps=5, trainer_name="x")
    assert [plan.at(step).name for step in range(5)] == ["head-warmup"] * 2 + ["train"] * 3
    apply_stage(plan.at(0), model, {}, "x")
    _, found = gradients(model, Baseline(), batch)
    assert found
    assert all(name.startswith("extra_heads.") for name in found)
    apply_stage(plan.at(2), model, {}, "x")
    _, found = gradients(model, Baseline(), batch)
    assert any(name.startswith("base.") for name in found)


def test_a_stage_without_model_loss_teaches_only_the_modules():
    model, batch, trainer = make_model(), make_batch(packed=False), Valued()
    stage = Stage(name="value", frozen=frozenset({"model", "heads"}), model_loss=False)
    step_loss(model, trainer)
    apply_stage(stage, model, trainer.modules(), "x")
    trainer.setup = lambda setup: None
    output, found = gradients(model, trainer, batch, stage=stage)
    assert set(found) == {"value.weight", "value.bias"}
    torch.testing.assert_close(output.loss.double(), output.metrics["auxiliary/value"].double())


def test_the_view_gives_every_algorithm_the_same_random_numbers_for_the_same_step():
    drawn = []

    class Draws(Trainer):
        def token_weights(self, view):
            drawn.append(torch.rand(3, generator=view.generator))

    model, batch = make_model(), make_batch(packed=False)
    for micro in (99, 1):
        gradients(model, Draws(), batch, micro=micro)
    step_loss(model, Draws())(batch, 4, Stage())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_evaluation_equals_plain_means_whatever_the_batches():
    from wmtp.training.evaluate import evaluate

    model, batch = make_model(decay=0.5), make_batch(packed=True)
    whole = evaluate(model, [batch], torch.device("cpu"), contextlib.nullcontext)
    pieces = [evolve(batch.rows(i, i + 1)) for i in range(5)]
    parts = evaluate(model, pieces, torch.device("cpu"), contextlib.nullcontext)
    expected = reference(model, batch, lambda *_: 1.0, [1.0, 0.5, 0.25])
    assert whole["eval/loss"] == pytest.approx(float(expected), rel=1e-6)
    assert parts == pytest.approx(whole, rel=1e-9)


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


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda view: None, "token_details returned a NoneType, not tensors by name"),
        (lambda view: {"value": [1.0]}, "token_details returned a list as 'value', not a tensor"),
        (lambda view: {"value": torch.zeros(3)}, r"token_details returned 'value' of shape \[3\]; it must be \[b, S\] = "),
    ],
)
def test_wrong_details_name_the_trainer(returned, said):
    class Wrong(Trainer):
        def token_details(self, view):
            return returned(view)

    with pytest.raises(PluginError, match=rf"^trainer 'mine' \(mine 1.0\): {said}"):
        step_loss(make_model(), Wrong())(make_batch(packed=False), 0, Stage(), tokens=True)

"""The cheap weighters, and the controls, against their definitions."""

import math

import pytest
import torch
from attrs import evolve

import wmtp
from wmtp.data.batch import PADDING
from wmtp.errors import ConfigError
from wmtp.testing.steps import HORIZON, VOCAB_SIZE, make_view, pad, random_step
from wmtp.trainers import Stage, Trainer
from wmtp_algos import DFT, EAFT, AdaMTP, Column, EntropyTop, Focal, HorizonDecay, RandomMatched, Rho1WMTP, Shuffled
from wmtp_algos.random_matched import RandomMatchedTrainer
from wmtp_algos.shuffled import ShuffledTrainer


def weights_of(trainer, step, **options):
    """Each valid prediction's weight, by (row, t, k)."""
    view = make_view(trainer, step, **options)
    weights = trainer.token_weights(view)
    if weights.ndim == 2:
        weights = view.by_prediction(weights)
    return {(b, t, k + 1): float(weights[b, t, k]) for b, t, k in view.targets.valid.nonzero().tolist()}


def steps():
    return [pad(random_step(seed, packed=bool(seed % 2)), columns=seed, rows=seed % 2) for seed in range(4)]


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        (DFT(), lambda step, b, t, k: math.exp(-float(step.token_loss[b, t, k - 1]))),
        (Focal(gamma=1.5), lambda step, b, t, k: (1 - math.exp(-float(step.token_loss[b, t, k - 1]))) ** 1.5),
        (HorizonDecay(decay=0.5), lambda step, b, t, k: 0.5 ** (k - 1)),
        (Column(), lambda step, b, t, k: float(step.batch.weight[b, t + k])),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_weights_are_the_formula(config, weight):
    for step in steps():
        ours = weights_of(config.build(), step)
        assert ours == pytest.approx({place: weight(step, *place) for place in ours}, rel=1e-5)


@pytest.mark.parametrize(("top_k", "vocab_size", "used"), [(20, VOCAB_SIZE, 20), (20, 7, 7)])
def test_eaft_divides_by_the_largest_entropy_there_can_be(top_k, vocab_size, used):
    trainer = EAFT(top_k=top_k).build()
    assert trainer.needs_entropy
    assert trainer.entropy_top_k == top_k
    step = random_step(0, packed=True)
    view = evolve(make_view(trainer, step), vocab_size=vocab_size)
    weights = trainer.token_weights(view)
    ours = {(b, t, k + 1): float(weights[b, t, k]) for b, t, k in view.targets.valid.nonzero().tolist()}
    assert ours == pytest.approx({(b, t, k): float(step.entropy[b, t, k - 1]) / math.log(used) for b, t, k in ours})


@pytest.mark.parametrize("scope", ["batch", "sequence", "head"])
def test_entropy_top_keeps_the_least_certain_of_each_group(scope):
    for step in steps():
        ours = weights_of(EntropyTop(keep=0.4, scope=scope).build(), step)
        groups = {}
        for b, t, k in ours:
            group = {"batch": 0, "sequence": int(step.batch.document[b, t]), "head": k}[scope]
            groups.setdefault(group, []).append((float(step.entropy[b, t, k - 1]), (b, t, k)))
        for members in groups.values():
            members.sort(reverse=True)
            kept = max(1, round(0.4 * len(members)))
            assert [ours[place] for _, place in members] == [1.0] * kept + [0.0] * (len(members) - kept)


@pytest.mark.parametrize(("confidence", "min_depth"), [(0.3, 1), (0.6, 2), (0.0, 1), (1.0, 1)])
def test_adamtp_learns_up_to_the_first_head_that_is_not_sure(confidence, min_depth):
    cut = 0
    for step in steps():
        ours = weights_of(AdaMTP(confidence=confidence, min_depth=min_depth).build(), step)
        for (b, t, k), weight in ours.items():
            depth = 1
            while depth < HORIZON:
                counts = (b, t, depth) in ours
                if not counts or math.exp(-float(step.token_loss[b, t, depth - 1])) < confidence:
                    break
                depth += 1
            assert weight == float(k <= max(depth, min_depth))
            cut += weight == 0
    assert cut > 0


def test_column_refuses_data_without_weights():
    step = random_step(0, packed=True)
    step = evolve(step, batch=evolve(step.batch, weight=None))
    with pytest.raises(ConfigError, match="'column' takes its weights from the data, but no document has any"):
        Column().build().token_weights(make_view(Column().build(), step))


PLAN = {
    "models": {"base": {"type": "scratch", "vocab_size": 300}},
    "tokenizer": {"type": "bytes"},
    "datasets": {"py": {"type": "python-source"}},
    "tracker": {"type": "jsonl"},
}

# --- controls


class Skewed(Trainer):
    """A few large weights and many zeros, other ones at each head."""

    def token_weights(self, view):
        k = torch.arange(1, view.targets.ids.shape[-1] + 1)
        return torch.where(view.targets.ids % 3 == 0, 0.0, (view.targets.ids.float() * k) ** 2 / 100)


class ByToken(Trainer):
    def token_weights(self, view):
        return (view.batch.input_ids % 7).float()


class Nothing(Trainer):
    pass


def by_head(weights):
    return [torch.tensor([w for (_, _, k), w in sorted(weights.items()) if k == head + 1]) for head in range(HORIZON)]


@pytest.mark.parametrize("treatment", [Skewed(), ByToken(), Nothing(), DFT().build()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_shuffled_has_the_weights_of_each_head_in_another_order(treatment, packed):
    step = random_step(3, packed=packed, rows=6, length=30)
    treated, control = (
        by_head(weights_of(trainer, step)) for trainer in (treatment, ShuffledTrainer(treatment, "trainer 'mine'"))
    )
    for before, after in zip(treated, control, strict=True):
        assert torch.equal(before.sort().values, after.sort().values)
        assert type(treatment) is Nothing or not torch.equal(before, after)


def test_shuffled_puts_any_weight_anywhere_and_anew_in_each_step():
    step = random_step(3, packed=True, rows=6, length=30)
    orders = [by_head(weights_of(ShuffledTrainer(DFT().build(), ""), step, number=n))[0] for n in range(400)]
    treated = by_head(weights_of(DFT().build(), step))[0]
    mean = torch.stack(orders).mean(dim=0)
    # the mean over many steps forgets the assignment: nothing of it is left but noise
    standard_error = treated.std() / math.sqrt(len(orders))
    assert (mean - treated.mean()).abs().max() < 5 * standard_error
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)


@pytest.mark.parametrize("treatment", [Skewed(), ByToken(), Nothing(), DFT().build()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_random_matched_has_mean_and_spread_of_each_head(treatment, packed):
    for seed in range(5):
        step = random_step(seed, packed=packed, rows=24, length=30)
        treated, control = (
            by_head(weights_of(trainer, step)) for trainer in (treatment, RandomMatchedTrainer(treatment, "trainer 'mine'"))
        )
        for before, after in zip(treated, control, strict=True):
            assert (after >= 0).all()
            assert float(after.double().mean()) == pytest.approx(float(before.double().mean()), rel=1e-5)
            spread = float(before.double().std(correction=0))
            assert float(after.double().std(correction=0)) == pytest.approx(spread, rel=1e-3, abs=1e-6)
            if spread:
                assert abs(float(torch.corrcoef(torch.stack([before, after]))[0, 1])) < 0.5


@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("kind", ["zeros", "constant", "one of all"])
def test_random_matched_at_the_ends(kind, count):
    weights = {"zeros": torch.zeros(count), "constant": torch.full((count,), 2.5), "one of all": torch.eye(count)[0]}[kind]
    drawn = RandomMatchedTrainer(Nothing(), "").replace(weights, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.mean(), weights.mean())
    torch.testing.assert_close(drawn.std(correction=0), weights.std(correction=0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("control", [ShuffledTrainer, RandomMatchedTrainer])
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_weights_that_are_not_allowed_stay_so(control, bad):
    """A broken treatment must not become a sound control."""

    class Broken(Trainer):
        def token_weights(self, view):
            return torch.where(view.batch.input_ids == view.batch.input_ids[0, -1], bad, 1.0)

    step = random_step(0, packed=False)
    values = weights_of(control(Broken(), ""), step).values()
    assert any(math.isnan(v) if math.isnan(bad) else v == bad for v in values)


def test_controls_name_the_treatment_and_its_distribution():
    trainer = Shuffled(of=RandomMatched(of=Rho1WMTP())).build()
    assert trainer._name == "trainer 'random-matched' (wmtp-algos 0.1.0)"


def test_padding_has_no_weight():
    step = pad(random_step(0, packed=True), columns=3, rows=1)
    for trainer in (ShuffledTrainer(Skewed(), ""), RandomMatchedTrainer(Skewed(), "")):
        view = make_view(trainer, step)
        assert not trainer.token_weights(view)[step.batch.document == PADDING].any()


@pytest.mark.parametrize("control", [ShuffledTrainer, RandomMatchedTrainer])
def test_a_control_is_its_treatment_in_all_but_the_weights(control):
    class Treatment(Trainer):
        needs_token_loss = True
        needs_entropy = True

        def setup(self, setup):
            self.entropy_top_k = setup

        def modules(self):
            return {"value": torch.nn.Identity()}

        def stages(self):
            return (Stage(name="value", steps=2, model_loss=False), Stage())

        def observe(self, view):
            return {"seen": view}

        def check_data(self, data):
            return [data]

        def groups(self, data, stage):
            return [data, stage]

        def learning_rates(self):
            return {"value": 1.0}

        def auxiliary_losses(self, view):
            return {"loss": view}

        def token_details(self, view):
            return {"value": view}

        def metrics(self):
            return {"mean": 1.0}

        def state_dict(self):
            return {"state": 2.0}

        def load_state_dict(self, state):
            self.state = state

    treatment = Treatment()
    trainer = control(treatment, "")
    assert (trainer.needs_token_loss, trainer.needs_entropy, trainer.entropy_top_k) == (True, True, None)
    trainer.setup(5)
    assert trainer.entropy_top_k == 5, "a treatment may decide in setup"
    assert list(trainer.modules()) == ["value"]
    assert trainer.stages() == treatment.stages()
    assert trainer.check_data("x") == ["x"]
    assert trainer.groups("x", Stage()) == ["x", Stage()]
    assert trainer.learning_rates() == {"value": 1.0}
    assert trainer.observe(1) == {"seen": 1}
    assert trainer.auxiliary_losses(2) == {"loss": 2}
    assert trainer.token_details(3) == {"value": 3}
    assert trainer.metrics() == {"mean": 1.0}
    trainer.load_state_dict(trainer.state_dict())
    assert treatment.state == {"state": 2.0}


@pytest.mark.parametrize(("trainer", "normalizer", "warned"), [
    ("trainer.type=dft", "sum_w", True),
    ("trainer.type=dft", "valid", False),
    ("trainer.type=shuffled trainer.of.type=eaft", "per_position", True),
    ("trainer.type=focal", "sum_w", False),
])  # fmt: skip
def test_a_normalizer_that_changes_an_algorithm_is_warned_of(trainer, normalizer, warned):
    found = wmtp.check(PLAN, overrides=[*trainer.split(), f"train.normalizer={normalizer}"]).warnings
    assert any(line.startswith(f'train.normalizer: "{normalizer}" cancels') for line in found) is warned

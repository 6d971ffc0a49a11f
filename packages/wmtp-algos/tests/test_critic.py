"""critic-wmtp's weights, losses and pairs against plain loops in float64."""

import math

import numpy as np
import pytest
import torch
from attrs import evolve

from wmtp.data.batch import PADDING
from wmtp.testing.steps import HIDDEN_SIZE, HORIZON, VOCAB_SIZE, make_view, pad, random_step, tiny_model
from wmtp.trainers import Stage, TrainerSetup
from wmtp_algos import CriticWMTP
from wmtp_algos.pairs import pair_documents, pairs_of_step, pairwise_accuracy, pairwise_loss
from wmtp_algos.random_matched import RandomMatchedTrainer
from wmtp_algos.shuffled import ShuffledTrainer


def make(**options):
    trainer = CriticWMTP(**{"pair_length_ratio": 3.0} | options).build()
    trainer.setup(
        TrainerSetup(
            hidden_size=HIDDEN_SIZE,
            vocab_size=VOCAB_SIZE,
            horizon=HORIZON,
            device=torch.device("cpu"),
            seed=0,
            tokenizer=None,
            model=None,
            token_numbers=None,
        )
    )
    return trainer


def steps():
    """Ragged batches with documents of rewards other than their labels, packed or not, and with more padding."""
    for seed in range(4):
        step = pad(random_step(seed, packed=bool(seed % 2), rows=6, length=17), columns=seed, rows=seed % 2)
        documents = [evolve(d, reward=None if n % 3 else 0.3 * n - 1) for n, d in enumerate(step.batch.documents)]
        yield evolve(step, batch=evolve(step.batch, documents=documents))


def tokens_of(batch, number):
    """(row, place) of a document's tokens, in order."""
    return [(b, t) for b, t in (batch.document == number).nonzero().tolist()]


def reward(document):
    return document.reward if document.reward is not None else float(document.is_correct)


def plain_advantages(batch, value, *, gamma, lam, delta, pairwise=False):
    """{(row, place): A} of every token that has a state before it."""
    found = {}
    for number, document in enumerate(batch.documents):
        places = tokens_of(batch, number)
        running = 0.0
        for n, place in reversed(list(enumerate(places))):
            last = n == len(places) - 1
            gained = (float(value[place]) if pairwise else reward(document)) if last else gamma * float(value[place])
            if n == 0:
                break
            td = gained - float(value[places[n - 1]])
            running = td if delta == "td" else td + gamma * lam * running
            found[place] = running
    return found


OPTIONS = [
    {},
    {"delta": "td", "gamma": 0.9},
    {"train_on": "all", "gae_lambda": 0.6, "beta": 2.0},
    {"value_loss": "pairwise", "min_weight": 0.5, "max_weight": 1.5},
    {"whitening": "batch", "gamma": 0.95, "value_learns": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_equal_loops(options):
    """Over several steps, so that the running means count."""
    trainer = make(**options)
    config = trainer._config
    mean_sum = square_sum = factors = 0.0
    for step in steps():
        view = make_view(trainer, step)
        batch, value = view.batch, view.observations["value"].double()
        ours = trainer.token_weights(view)
        assert not ours.requires_grad
        known = plain_advantages(
            batch,
            value,
            gamma=config.gamma,
            lam=config.gae_lambda,
            delta=config.delta,
            pairwise=config.value_loss == "pairwise",
        )
        right = [config.train_on == "all" or document.is_correct for document in batch.documents]
        learned = {place: a for place, a in known.items() if batch.loss_mask[place] and right[int(batch.document[place])]}
        mean = sum(learned.values()) / len(learned)
        square = sum(a * a for a in learned.values()) / len(learned)
        decay = config.ema_decay if config.whitening == "ema" else 0.0
        mean_sum, square_sum, factors = (
            decay * old + (1 - decay) * new for old, new in ((mean_sum, mean), (square_sum, square), (factors, 1.0))
        )
        mean, std = mean_sum / factors, math.sqrt(square_sum / factors - (mean_sum / factors) ** 2)
        raw = {
            place: min(config.max_weight, max(config.min_weight, math.exp((a - mean) / std / config.beta)))
            for place, a in learned.items()
        }
        # a token's weight counts at each of its predictions, and the mean over those is 1
        predicted = {(b, t): min(HORIZON, int(batch.position[b, t])) for b, t in raw}
        average = sum(raw[place] * n for place, n in predicted.items()) / sum(predicted.values())
        for place, weight in raw.items():
            assert float(ours[place]) == pytest.approx(weight / average, rel=2e-4)
        wrong = [place for place in known if batch.loss_mask[place] and not right[int(batch.document[place])]]
        assert all(float(ours[place]) == 0 for place in wrong)
        assert all(float(ours[place]) == 0 for place in known if not batch.loss_mask[place]), "a prompt has no weight"
        placed = view.by_prediction(ours)[trainer.eligible(view)]
        assert float(placed.mean()) == pytest.approx(1.0, abs=1e-5)
        assert len(placed) == sum(predicted.values())


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.4)])
def test_the_value_loss_equals_loops(gamma, lam):
    trainer = make(gamma=gamma, gae_lambda=lam)
    for step in steps():
        view = make_view(trainer, step, stage="value")
        batch, value = view.batch, view.observations["value"].double()
        errors, targets, values = [], [], []
        for number, document in enumerate(batch.documents):
            places = tokens_of(batch, number)
            target = reward(document)
            for n, place in reversed(list(enumerate(places))):
                if n < len(places) - 1:
                    after = places[n + 1]
                    target = (1 - lam) * gamma * float(value[after]) + lam * gamma * target
                # after each token to learn, and after the prompt
                if batch.loss_mask[place] or (n < len(places) - 1 and batch.loss_mask[places[n + 1]]):
                    errors.append((float(value[place]) - target) ** 2)
                    targets.append(gamma ** (len(places) - 1 - n) * reward(document))
                    values.append(float(value[place]))
        losses = trainer.auxiliary_losses(view)
        assert float(losses["value"]) == pytest.approx(sum(errors) / len(errors), rel=1e-5)
        metrics = {name: float(number) for name, number in trainer.metrics().items()}
        assert metrics["critic/value_loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
        targets, values = np.array(targets), np.array(values)
        assert metrics["critic/explained_variance"] == pytest.approx(1 - (targets - values).var() / targets.var(), rel=1e-4)


def test_the_target_of_the_value_is_a_constant():
    """The gradient of (V − G)² is 2 (V − G), though G is made of V."""
    trainer = make()
    step = next(steps())
    view = make_view(trainer, step, stage="value")
    leaf = view.observations["value"].clone().requires_grad_()
    trainer.auxiliary_losses(evolve(view, observations={"value": leaf}))["value"].backward()
    changed = leaf.detach().clone()
    place = tokens_of(view.batch, 0)[-1]  # the last token: its target is the reward
    wanted = 2 * (changed[place] - reward(view.batch.documents[0]))
    count = (leaf.grad != 0).sum()
    assert float(leaf.grad[place]) == pytest.approx(float(wanted / count), rel=1e-4)


def test_the_pairwise_loss_equals_loops():
    trainer = make(value_loss="pairwise")
    some = 0
    for step in steps():
        view = make_view(trainer, step, stage="value")
        batch, value = view.batch, view.observations["value"].double()
        means, lengths = {}, {}
        for number in range(len(batch.documents)):
            own = [place for place in tokens_of(batch, number) if batch.loss_mask[place]]
            lengths[number] = len(own)
            means[number] = sum(float(value[place]) for place in own) / len(own) if own else 0.0
        pairs = plain_pairs(batch.documents, lengths, 3.0)
        losses = [math.log1p(math.exp(means[j] - means[i])) for i, j in pairs]
        loss = float(trainer.auxiliary_losses(view)["value"])
        assert loss == pytest.approx(sum(losses) / len(losses) if losses else 0.0, rel=1e-5)
        accuracy = float(trainer.metrics()["critic/pairwise_accuracy"])
        assert accuracy == pytest.approx(np.mean([means[i] > means[j] for i, j in pairs]) if pairs else math.nan, nan_ok=True)
        some += len(pairs)
    assert some > 3


def plain_pairs(documents, lengths, ratio):
    """Nearest partners, by plain loops."""
    fits = lambda i, j: (
        documents[i].is_correct
        and not documents[j].is_correct
        and documents[i].group == documents[j].group
        and 0 < max(lengths[i], lengths[j]) <= ratio * min(lengths[i], lengths[j])
    )
    found = set()
    for i in range(len(documents)):
        mine = [j for j in range(len(documents)) if fits(i, j)]
        if mine:
            found.add((i, min(mine, key=lambda j: (abs(lengths[i] - lengths[j]), j))))
        theirs = [j for j in range(len(documents)) if fits(j, i)]
        if theirs:
            found.add((min(theirs, key=lambda j: (abs(lengths[i] - lengths[j]), j)), i))
    return sorted(found)


def test_groups_of_two_data_sets_are_two_problems():
    step = random_step(0, packed=True, rows=6)
    documents = [evolve(d, group="same", source="a" if d.is_correct else "b") for d in step.batch.documents]
    trainer = make(value_loss="pairwise", pair_length_ratio=100.0)
    view = make_view(trainer, evolve(step, batch=evolve(step.batch, documents=documents)), stage="value")
    assert float(trainer.auxiliary_losses(view)["value"]) == 0
    documents = [evolve(d, group="same", source="a") for d in step.batch.documents]
    view = make_view(trainer, evolve(step, batch=evolve(step.batch, documents=documents)), stage="value")
    assert float(trainer.auxiliary_losses(view)["value"]) > 0


def test_pairs_of_a_step():
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    correct = torch.tensor([True, False, False, True, True, False])
    length = torch.tensor([10, 11, 14, 13, 5, 50])
    pairs = pairs_of_step(group, correct, length, 1.5)
    assert pairs.nonzero().tolist() == [[0, 1], [3, 2]]
    value = torch.tensor([1.0, 3.0, 0.0, 0.5, 0.0, 0.0])
    assert float(pairwise_accuracy(value, pairs)) == 0.5
    expected = (math.log1p(math.exp(2.0)) + math.log1p(math.exp(-0.5))) / 2
    assert float(pairwise_loss(value, pairs)) == pytest.approx(expected)
    assert not pairs_of_step(group, torch.ones(6, dtype=torch.bool), length, 9.0).any()


@pytest.mark.parametrize("seed", range(5))
def test_partners_in_a_whole_data_set(seed):
    draw = np.random.default_rng(seed)
    groups, correct, lengths = draw.integers(0, 12, 80), draw.random(80) < 0.4, draw.integers(5, 40, 80)
    pair = pair_documents(groups, correct, lengths, 1.6)
    free = pair_documents(groups, correct, lengths, math.inf)
    for number in set(pair[pair >= 0].tolist()):
        members = np.flatnonzero(pair == number)
        assert len(members) == 2
        assert sorted(correct[members].tolist()) == [False, True]
        assert len(set(groups[members])) == 1
        assert lengths[members].max() <= 1.6 * lengths[members].min()
    for group in set(groups):
        own = groups == group
        wanted = 2 * min((own & correct).sum(), (own & ~correct).sum())
        assert (free[own] >= 0).sum() == wanted, "as many pairs as there can be"


def test_what_the_critic_learns_from_never_changes_the_main_loss():
    """In stage train with a value that learns: its gradient is that of its own loss alone, whatever the model's loss is."""
    from contextlib import nullcontext

    from wmtp.config.schema import HeadsConfig
    from wmtp.models.mtp import MTPModel
    from wmtp.training.step import StepLoss

    found = []
    for model_loss in (True, False):
        trainer = make(value_learns=True, value_loss_coef=0.7)
        model = MTPModel(tiny_model(), HeadsConfig(horizon=HORIZON), seed=0).requires_grad_(False)
        step = StepLoss(
            model=model, trainer=trainer, trainer_name="x", micro_batch_size=3, normalizer="sum_w", device=torch.device("cpu"),
            autocast=nullcontext, seed=0,
        )  # fmt: skip
        step(random_step(1, packed=True).batch, 0, Stage(name="train", model_loss=model_loss))
        found.append({name: p.grad for name, p in trainer.modules()["value_head"].named_parameters()})
        assert all(p.grad is None for p in model.parameters())
    for name, gradient in found[0].items():
        assert gradient is not None
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, found[1][name])


def test_the_loss_of_the_value_never_reaches_the_trunk():
    trainer = make()
    step = random_step(1, packed=False)
    trunk = step.trunk.clone().requires_grad_()
    view = make_view(trainer, evolve(step, trunk=trunk), stage="value", with_gradient=True)
    trainer.auxiliary_losses(view)["value"].backward()
    assert trunk.grad is None


def test_the_head_warm_up_learns_the_same_documents_without_a_value():
    trainer = make()
    step = random_step(0, packed=True)
    view = make_view(trainer, step, stage="head-warmup")
    assert not view.observations
    weights = trainer.token_weights(view)
    for place in step.batch.loss_mask.nonzero().tolist():
        right = step.batch.documents[int(step.batch.document[tuple(place)])].is_correct
        assert float(weights[tuple(place)]) == float(right)
    assert trainer.auxiliary_losses(view) == {}


@pytest.mark.parametrize("control", [ShuffledTrainer, RandomMatchedTrainer])
def test_a_control_gives_no_weight_to_documents_that_are_not_learned(control):
    treatment = make(value_learns=True)
    view = make_view(treatment, random_step(1, packed=True, rows=6, length=17))
    weights = control(treatment, "x").token_weights(view)
    learned = treatment.eligible(view)
    assert (weights[~learned] == 0).all()
    assert (weights[learned] > 0).all()
    assert (view.targets.valid & ~learned).any()


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf, 1e38])
@pytest.mark.parametrize("whitening", ["ema", "batch"])
def test_a_value_that_explodes_gives_weights_that_the_loop_refuses(value, whitening):
    """Not weights of 1: the run must end, and say whose weights they are."""
    trainer = make(whitening=whitening)
    view = make_view(trainer, random_step(0, packed=True))
    broken = view.observations["value"].clone()
    broken[view.batch.loss_mask] = value
    broken[0] = -broken[0]
    weights = view.by_prediction(trainer.token_weights(evolve(view, observations={"value": broken})))
    assert value == 1e38 or not torch.isfinite(weights[trainer.eligible(view)]).all()
    if value == 1e38:
        assert torch.isfinite(weights[trainer.eligible(view)]).all(), "large, but numbers: clipped"


def test_details_for_the_report():
    trainer = make()
    view = make_view(trainer, random_step(2, packed=True))
    trainer.token_weights(view)
    details = trainer.token_details(view)
    known = plain_advantages(view.batch, view.observations["value"], gamma=1.0, lam=0.95, delta="gae")
    for b, t in (view.batch.document != PADDING).nonzero().tolist():
        shown = view.batch.loss_mask[b, t] and (b, t) in known
        assert bool(torch.isnan(details["advantage"][b, t])) is not bool(shown)
        if shown:
            assert float(details["advantage"][b, t]) == pytest.approx(known[b, t], abs=1e-5)
            assert float(details["value"][b, t]) == float(view.observations["value"][b, t])


def test_the_value_is_in_single_precision_under_autocast():
    trainer = make()
    step = random_step(0, packed=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = make_view(trainer, step).observations["value"]
    assert seen.dtype == torch.float32
    assert torch.equal(seen, make_view(trainer, step).observations["value"])

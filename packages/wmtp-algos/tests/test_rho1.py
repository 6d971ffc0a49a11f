"""rho1-wmtp against plain loops over documents, positions and heads, in float64."""

import contextlib
import math
from collections import defaultdict
from itertools import product

import pytest
import torch
from crossings import sampled

from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import PADDING, Batch, Document
from wmtp.models.config import ScratchModel
from wmtp.models.mtp import MTPModel
from wmtp.testing.steps import HIDDEN_SIZE, HORIZON, VOCAB_SIZE, make_view, pad, random_step, tiny_model
from wmtp.trainers import Stage, TrainerSetup
from wmtp.training.step import StepLoss
from wmtp_algos import Focal, Rho1WMTP
from wmtp_algos.reference import next_token_losses
from wmtp_algos.rho1_wmtp import Rho1WMTPTrainer
from wmtp_algos.selection import Groups


def reference_model(dtype=torch.float64, seed=3):
    return MTPModel(tiny_model(seed=seed), HeadsConfig(horizon=1), seed=0).to(dtype).eval().requires_grad_(False)


def set_up(trainer, reference):
    trainer.setup(
        TrainerSetup(
            hidden_size=HIDDEN_SIZE,
            vocab_size=VOCAB_SIZE,
            horizon=HORIZON,
            device=torch.device("cpu"),
            seed=0,
            tokenizer=None,
            model=lambda name, *, dtype, device: {"ref": reference}[name],
            token_numbers=None,
        )
    )
    return trainer


@torch.no_grad()
def plain_reference_losses(model, batch):
    """−log P(x_j | x_<j) by document and place in it: each document alone through the plain Hugging Face model."""
    found = {}
    for row, number in {(r, int(d)) for r in range(len(batch.document)) for d in batch.document[r] if d != PADDING}:
        places = [s for s in range(batch.input_ids.shape[1]) if batch.document[row, s] == number]
        ids = batch.input_ids[row, places]
        logits = model.base(input_ids=ids[None]).logits[0].double()
        for i in range(1, len(ids)):
            found[row, places[i]] = -math.log(torch.softmax(logits[i - 1], dim=0)[ids[i]])
    return found


def plain_scores(step, reference_losses, score):
    """The score of every valid (row, t, k), and the group it is in, for each scope."""
    batch = step.batch
    rows, length = batch.input_ids.shape
    scores, groups = {}, {"batch": {}, "sequence": {}, "head": {}}
    for b in range(rows):
        for t in range(length):
            for k in range(1, HORIZON + 1):
                j = t + k
                if j >= length or batch.document[b, j] != batch.document[b, t] or not batch.loss_mask[b, j]:
                    continue
                excess = float(step.token_loss[b, t, k - 1]) - reference_losses[b, j]
                scores[b, t, k] = {"excess": excess, "absolute": abs(excess), "reference": -reference_losses[b, j]}[score]
                groups["batch"][b, t, k] = 0
                groups["sequence"][b, t, k] = int(batch.document[b, t])
                groups["head"][b, t, k] = k
    return scores, groups


def members_of(groups):
    members = defaultdict(list)
    for place, group in groups.items():
        members[group].append(place)
    return members.values()


def plain_kept(scores, groups, keep):
    kept = set()
    for places in members_of(groups):
        best = sorted(places, key=lambda place: (-scores[place], place))
        kept |= set(best[: max(1, round(keep * len(places)))])
    return {place: float(place in kept) for place in scores}


def plain_softmax(scores, groups, temperature, min_excess, max_weight):
    scores = {place: 0.0 if abs(s) < min_excess else s for place, s in scores.items()}
    weights = {}
    for places in members_of(groups):
        total = sum(math.exp(scores[place] / temperature) for place in places)
        for place in places:
            weights[place] = min(max_weight, len(places) * math.exp(scores[place] / temperature) / total)
        mean = sum(weights[place] for place in places) / len(places)
        for place in places:
            weights[place] /= mean
    return weights


def weights_of(config, step, reference):
    trainer = set_up(Rho1WMTPTrainer(config), reference)
    view = make_view(trainer, step)
    weights = trainer.token_weights(view)
    assert weights.shape == view.targets.valid.shape
    return {(b, t, k + 1): float(weights[b, t, k]) for b, t, k in view.targets.valid.nonzero().tolist()}, trainer


CROSSING = sampled(product(("excess", "absolute", "reference"), ("batch", "sequence", "head"), (False, True)), 5)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("seed", range(3))
def test_reference_losses_are_those_of_each_document_alone(packed, seed):
    batch = random_step(seed, packed=packed, length=20).batch
    model = reference_model()
    ours = next_token_losses(model, batch, batch.packed)
    plain = plain_reference_losses(model, batch)
    assert ours.shape == batch.input_ids.shape
    for place, loss in plain.items():
        expected = loss if batch.loss_mask[place] else 0.0
        assert float(ours[place]) == pytest.approx(expected, rel=1e-6, abs=1e-6), place
    assert float(ours[:, 0].abs().max()) == 0.0


@pytest.mark.parametrize(("score", "scope", "packed"), CROSSING)
def test_selection_equals_the_loop(score, scope, packed):
    reference = reference_model()
    for seed in range(4):
        for keep in (0.05, 0.37, 0.6, 1.0):
            step = pad(random_step(seed, packed=packed), columns=seed % 3, rows=seed % 2)
            ours, _ = weights_of(Rho1WMTP(mode="token-skip", scope=scope, score=score, keep=keep), step, reference)
            scores, groups = plain_scores(step, plain_reference_losses(reference, step.batch), score)
            assert ours == plain_kept(scores, groups[scope], keep)


@pytest.mark.parametrize(("score", "scope", "packed"), CROSSING)
def test_weights_equal_the_loop(score, scope, packed):
    reference = reference_model()
    for seed in range(6):
        settings = {"temperature": 0.4 + seed, "min_excess": 0.3 * seed, "max_weight": 1.5 + seed}
        config = Rho1WMTP(mode="weighted", scope=scope, score=score, **settings)
        step = pad(random_step(seed, packed=packed), columns=seed % 3, rows=seed % 2)
        ours, _ = weights_of(config, step, reference)
        scores, groups = plain_scores(step, plain_reference_losses(reference, step.batch), score)
        min_excess = 0.0 if score == "reference" else config.min_excess
        expected = plain_softmax(scores, groups[scope], config.temperature, min_excess, config.max_weight)
        assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scope", ["batch", "sequence", "head"])
def test_weights_have_mean_one_where_none_is_clipped(scope):
    step = random_step(0, packed=True)
    ours, _ = weights_of(Rho1WMTP(mode="weighted", scope=scope, max_weight=math.inf), step, reference_model())
    assert sum(ours.values()) / len(ours) == pytest.approx(1.0, rel=1e-6)
    assert max(ours.values()) > 1.5


def new_heads(step, spread=5.0):
    """Losses as heads that are new have them: beside the reference's, SmolLM2's were 7 nats higher on average, and 5 apart."""
    draw = torch.Generator().manual_seed(0)
    far = 7.0 + spread * torch.randn(step.token_loss.shape, generator=draw, dtype=step.token_loss.dtype)
    step.token_loss[..., 1:] += far[..., 1:].clamp(min=0)
    return step


def shares(weights):
    """The effective sample of each head, as a share of its predictions, and each head's part of all weight."""
    found = {}
    for head in range(1, HORIZON + 1):
        of_head = [weight for (_, _, k), weight in weights.items() if k == head]
        ess = sum(of_head) ** 2 / sum(weight**2 for weight in of_head) / len(of_head)
        found[head] = ess, sum(of_head) / sum(weights.values())
    return found


def test_new_heads_leave_head_1_its_weight_and_learn_from_more_than_a_few_predictions():
    step = new_heads(random_step(0, packed=True, rows=24, length=64))
    ours, trainer = weights_of(Rho1WMTP(mode="weighted"), step, reference_model())
    for ess, part in shares(ours).values():
        assert ess > 0.0999
        assert part == pytest.approx(1 / HORIZON, rel=0.2)
    assert float(trainer.metrics()["rho1/temperature"]) > 0.7
    former, _ = weights_of(Rho1WMTP(mode="weighted", scope="batch", min_ess_share=0.0), step, reference_model())
    assert shares(former)[1][1] < 0.01
    assert min(ess for ess, _ in shares(former).values()) < 0.05


@pytest.mark.parametrize("scope", ["batch", "sequence", "head"])
def test_the_temperature_is_the_lowest_with_the_effective_sample_asked_for(scope):
    """Each group's weights are those of one temperature in a loop; a lower one has a smaller effective sample."""
    reference = reference_model()
    step = new_heads(random_step(1, packed=True, rows=6, length=40))
    ours, _ = weights_of(Rho1WMTP(mode="weighted", scope=scope, min_ess_share=0.3), step, reference)
    scores, groups = plain_scores(step, plain_reference_losses(reference, step.batch), "excess")
    raised = 0
    for places in members_of(groups[scope]):
        own = {place: scores[place] for place in places}

        def weigh(temperature, own=own):
            found = plain_softmax(own, dict.fromkeys(own, 0), temperature, 0.01, 3.0)
            return found, sum(found.values()) ** 2 / sum(weight**2 for weight in found.values()) / len(found)

        if weigh(0.7)[1] < 0.3:
            raised += 1
            low, high = 0.7, 700.0
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if weigh(middle)[1] < 0.3 else (low, middle)
        else:
            high = 0.7
        assert {place: ours[place] for place in own} == pytest.approx(weigh(high)[0], rel=1e-3, abs=1e-6)
    assert raised


def test_by_default_each_head_learns_the_papers_share_of_its_own_predictions():
    step = new_heads(random_step(0, packed=True, rows=8, length=40))
    ours, _ = weights_of(Rho1WMTP(), step, reference_model())
    for head in range(1, HORIZON + 1):
        of_head = [weight for (_, _, k), weight in ours.items() if k == head]
        assert set(of_head) == {0.0, 1.0}
        assert abs(sum(of_head) - 0.6 * len(of_head)) <= 1


def test_of_equal_scores_the_first_are_kept():
    step = random_step(0, packed=False)
    flat = step.token_loss.zero_()
    reference = reference_model()
    # scores that differ in nothing: every token has the same reference loss, log V
    reference.unembedding(1).weight.zero_()
    ours, _ = weights_of(Rho1WMTP(scope="batch", keep=0.5), step, reference)
    assert flat.abs().sum() == 0
    places = sorted(ours)
    assert [ours[place] for place in places] == sorted((ours[place] for place in places), reverse=True)
    assert sum(ours.values()) == round(0.5 * len(ours))


@pytest.mark.parametrize("scope", ["batch", "sequence", "head"])
def test_all_that_is_valid_is_kept_and_nothing_else_where_the_share_is_1(scope):
    view = make_view(Focal(), pad(random_step(1, packed=True), columns=5, rows=2))
    assert torch.equal(Groups.of(scope, view).top(view.token_loss, 1.0), view.targets.valid)


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.9, 1.0])
def test_the_kept_share_is_of_valid_predictions(keep):
    step = random_step(1, packed=True, rows=8, length=40)
    for columns, rows in ((0, 0), (30, 0), (0, 9)):
        ours, _ = weights_of(Rho1WMTP(scope="batch", keep=keep), pad(step, columns=columns, rows=rows), reference_model())
        assert abs(sum(ours.values()) - keep * len(ours)) <= 1


def test_metrics_are_means_over_valid_predictions():
    step = random_step(2, packed=True)
    reference = reference_model()
    _, trainer = weights_of(Rho1WMTP(mode="weighted"), pad(step, columns=4, rows=1), reference)
    losses = plain_reference_losses(reference, step.batch)
    excess, _ = plain_scores(step, losses, "excess")
    by_reference, _ = plain_scores(step, losses, "reference")
    metrics = {name: float(value) for name, value in trainer.metrics().items()}
    assert metrics.pop("rho1/temperature") == pytest.approx(0.7)
    assert metrics == pytest.approx(
        {
            "rho1/excess": sum(excess.values()) / len(excess),
            "rho1/reference_loss": -sum(by_reference.values()) / len(by_reference),
        },
        rel=1e-5,
    )


class Recording(Rho1WMTPTrainer):
    def token_weights(self, view):
        self.valid = view.targets.valid
        self.excess = view.token_loss - view.by_prediction(view.observations["reference_loss"])
        return super().token_weights(view)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_a_model_that_is_its_own_reference_has_no_excess_at_head_1(packed, micro_batch_size):
    model = MTPModel(tiny_model(), HeadsConfig(horizon=HORIZON), seed=0)
    trainer = set_up(Recording(Rho1WMTP()), reference_model(torch.float32, seed=0))
    run_step(model, trainer, random_step(0, packed=packed).batch, micro_batch_size)
    assert trainer.excess[..., 0][trainer.valid[..., 0]].abs().max() < 2e-6
    assert trainer.excess[..., 1][trainer.valid[..., 1]].abs().max() > 0.01


def run_step(model, trainer, batch, micro_batch_size=4):
    return StepLoss(
        model=model,
        trainer=trainer,
        trainer_name="rho1-wmtp",
        micro_batch_size=micro_batch_size,
        normalizer="sum_w",
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        seed=0,
    )(batch, 0, Stage())


def test_a_perfect_reference_has_no_loss():
    """A model that knows the rule of a text, x_{j+1} = 7 x_j + 3, gives no loss to tokens by the rule, and much to others."""
    shape = ScratchModel(
        vocab_size=VOCAB_SIZE, hidden_size=64, layers=1, attention_heads=2, intermediate_size=8, max_positions=64
    )
    base = shape.build().load(None, dtype=torch.float32, seed=0).model
    with torch.no_grad():
        for layer in base.model.layers:  # what is left of the model is norm(embedding) · unembedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        base.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE, 64))
        base.lm_head.weight.zero_()
        for token in range(VOCAB_SIZE):
            base.lm_head.weight[(7 * token + 3) % VOCAB_SIZE, token] = 2.0
    reference = MTPModel(base, HeadsConfig(horizon=1), seed=0).eval()
    ids = torch.tensor([[5] * 12])
    for j in range(1, 12):
        ids[0, j] = (7 * ids[0, j - 1] + 3) % VOCAB_SIZE
    ids[0, 6] = (ids[0, 6] + 1) % VOCAB_SIZE  # one token, which breaks the rule, and so does the one after it
    batch = Batch(
        input_ids=ids,
        document=torch.zeros_like(ids),
        position=torch.arange(12)[None],
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
        documents=[Document(index=0, start=0, id="d", group="d")],
    )
    losses = next_token_losses(reference, batch, packed=False)[0]
    assert [j for j in range(12) if losses[j] > 9] == [6, 7]
    assert all(losses[j] < 1e-3 for j in range(12) if j not in (6, 7))


def test_the_reference_runs_once_for_each_row_of_a_step():
    rows = []
    reference = reference_model(torch.float32)
    reference.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    trainer = set_up(Rho1WMTPTrainer(Rho1WMTP()), reference)
    model = MTPModel(tiny_model(), HeadsConfig(horizon=HORIZON), seed=0)
    run_step(model, trainer, random_step(0, packed=True, rows=6).batch, micro_batch_size=4)
    assert rows == [4, 2]


def test_the_reference_computes_in_its_own_precision():
    step = random_step(0, packed=True)
    model = reference_model(torch.float32)
    exact = next_token_losses(model, step.batch, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(next_token_losses(model, step.batch, True), exact)
    half = next_token_losses(reference_model(torch.bfloat16), step.batch, True)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", ["weighted", "token-skip"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_reference_that_gives_no_numbers_is_no_ranking(mode, broken):
    reference = reference_model()
    reference.unembedding(1).weight.fill_(broken)
    ours, _ = weights_of(Rho1WMTP(mode=mode), random_step(0, packed=False), reference)
    assert any(math.isnan(weight) for weight in ours.values())

"""Loss and gradient of a whole step, for each weighter, by loops over documents that the model reads one at a time."""

import contextlib
import math

import pytest
import torch

from wmtp.config.schema import HeadsConfig
from wmtp.models.mtp import MTPModel
from wmtp.testing.steps import HIDDEN_SIZE, HORIZON, VOCAB_SIZE, random_step, tiny_model
from wmtp.trainers import Stage, TrainerSetup
from wmtp.training.step import StepLoss
from wmtp_algos import DFT, EAFT, AdaMTP, EntropyTop, Focal, HorizonDecay, Rho1WMTP, SSToken

ALPHA = (1.0, 0.5, 0.25)


def make_model(seed, horizon):
    heads = HeadsConfig(horizon=horizon, kind="residual", init="random", decay=0.5 if horizon > 1 else None)
    return MTPModel(tiny_model(seed=seed), heads, seed=seed).double().eval()


def distributions(model, batch):
    """log P of each head by (row, place, head); each document is read alone, so nothing is packed and nothing padded."""
    found = {}
    for number in range(len(batch.documents)):
        places = (batch.document == number).nonzero().tolist()
        ids = torch.tensor([[int(batch.input_ids[b, t]) for b, t in places]])
        output = model(ids, torch.arange(len(places))[None], False)
        for head in range(1, model.horizon + 1):
            for (b, t), logits in zip(places, model.logits(output, head)[0], strict=True):
                found[b, t, head] = logits.log_softmax(-1)
    return found


def entropy(log_p, top_k):
    best = sorted(log_p.exp().tolist(), reverse=True)[:top_k]
    return -sum(p / sum(best) * math.log(p / sum(best)) for p in best)


def best(scores, group_of, keep):
    """1 for the best share of each group, else 0."""
    kept = set()
    for group in {group_of(place) for place in scores}:
        members = sorted((place for place in scores if group_of(place) == group), key=lambda place: -scores[place])
        kept |= set(members[: max(1, round(keep * len(members)))])
    return {place: float(place in kept) for place in scores}


def sure(p, place, confidence):
    b, t, k = place
    return all((b, t, before) in p and p[b, t, before] >= confidence for before in range(1, k))


#: each weighter, and its weights from p and log P of the model, and the other model's loss of the same token
WEIGHTERS = {
    DFT(): lambda p, log_p, other: p,
    Focal(gamma=1.5): lambda p, log_p, other: {place: (1 - q) ** 1.5 for place, q in p.items()},
    HorizonDecay(decay=0.3): lambda p, log_p, other: {place: 0.3 ** (place[2] - 1) for place in p},
    EAFT(top_k=5): lambda p, log_p, other: {place: entropy(log_p[place], 5) / math.log(5) for place in p},
    EntropyTop(keep=0.4, scope="batch"): lambda p, log_p, other: best(
        {place: entropy(log_p[place], VOCAB_SIZE) for place in p}, lambda place: 0, 0.4
    ),
    AdaMTP(confidence=0.016): lambda p, log_p, other: {place: float(sure(p, place, 0.016)) for place in p},
    Rho1WMTP(keep=0.5): lambda p, log_p, other: best(
        {place: -math.log(q) - other[place] for place, q in p.items()}, lambda place: place[2], 0.5
    ),
    SSToken(keep=0.5, scope="batch"): lambda p, log_p, other: best(
        {place: other[place] + math.log(q) for place, q in p.items()}, lambda place: 0, 0.5
    ),
}


@pytest.mark.parametrize("normalizer", ["sum_w", "valid"])
@pytest.mark.parametrize("config", WEIGHTERS, ids=lambda config: config.type)
def test_a_step_is_what_loops_over_single_documents_give(config, normalizer):
    learner, other, batch = make_model(4, HORIZON), make_model(3, 1).requires_grad_(False), random_step(3, packed=True).batch
    trainer = config.build()
    trainer.setup(
        TrainerSetup(
            hidden_size=HIDDEN_SIZE, vocab_size=VOCAB_SIZE, horizon=HORIZON, device=torch.device("cpu"), seed=0, tokenizer=None,
            model=lambda name, *, dtype, device: other, token_numbers=None,
        )
    )  # fmt: skip
    step = StepLoss(
        model=learner, trainer=trainer, trainer_name="it", micro_batch_size=3, normalizer=normalizer,
        device=torch.device("cpu"), autocast=contextlib.nullcontext, seed=0,
    )  # fmt: skip
    ours = step(batch, 0, Stage())
    gradients = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    learner.zero_grad()

    log_p, of_other = distributions(learner, batch), distributions(other, batch)
    ids, length = batch.input_ids, batch.input_ids.shape[1]
    places = [
        (b, t, k)
        for b, t, k in log_p
        if t + k < length and batch.document[b, t + k] == batch.document[b, t] and batch.loss_mask[b, t + k]
    ]
    p = {(b, t, k): log_p[b, t, k][ids[b, t + k]].exp().item() for b, t, k in places}
    theirs = {(b, t, k): -of_other[b, t + k - 1, 1][ids[b, t + k]].item() for b, t, k in places}
    weights = WEIGHTERS[config](p, {place: value.detach() for place, value in log_p.items()}, theirs)
    assert len({round(weight, 6) for weight in weights.values()}) > 1
    z = sum(ALPHA[k - 1] * (weights[b, t, k] if normalizer == "sum_w" else 1.0) for b, t, k in places)
    loss = sum(-ALPHA[k - 1] * weights[b, t, k] * log_p[b, t, k][ids[b, t + k]] for b, t, k in places) / z
    loss.backward()
    assert float(ours.loss) == pytest.approx(loss.item(), rel=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in learner.parameters())
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6 * largest, msg=name)

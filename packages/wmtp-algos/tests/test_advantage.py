"""The critic's mathematics against plain loops in float64, over ragged batches with packing and padding."""

import math

import pytest
import torch

from wmtp.data.batch import PADDING
from wmtp.testing.steps import pad, random_step
from wmtp_algos.advantage import (
    advantage_weights,
    advantages,
    by_token,
    correlation,
    discounted_sums,
    document_means,
    lambda_returns,
    masked_moments,
    monte_carlo_returns,
)

SEEDS = range(6)


def ragged(seed):
    """Document numbers, values and rewards of a random batch; padding holds garbage."""
    step = pad(random_step(seed, packed=bool(seed % 2), rows=5, length=19), columns=seed % 3, rows=seed % 2)
    document = step.batch.document
    draw = torch.Generator().manual_seed(seed)
    value = 3 * torch.randn(document.shape, generator=draw, dtype=torch.float64)
    rewards = torch.randn(len(step.batch.documents), generator=draw, dtype=torch.float64)
    return document, value, rewards


def stretches(document):
    """(row, start, stop, number) of every document."""
    found = []
    for b, row in enumerate(document.tolist()):
        t = 0
        while t < len(row):
            stop = t
            while stop < len(row) and row[stop] == row[t]:
                stop += 1
            if row[t] != PADDING:
                found.append((b, t, stop, row[t]))
            t = stop
    return found


def same(ours, expected, document):
    """Equal to 1e-9 at every real token."""
    real = document != PADDING
    assert torch.isfinite(ours).all()
    assert (ours - expected)[real].abs().max() < 1e-9
    assert (ours[~real] == 0).all()


def loop_lambda_returns(document, value, rewards, gamma, lam):
    out = torch.zeros_like(value)
    for b, start, stop, number in stretches(document):
        out[b, stop - 1] = rewards[number]
        for t in reversed(range(start, stop - 1)):
            out[b, t] = (1 - lam) * gamma * value[b, t + 1] + lam * gamma * out[b, t + 1]
    return out


def loop_advantages(document, value, rewards, gamma, lam):
    """Generalized advantages, and the temporal differences that they are made of."""
    gae, td = torch.zeros_like(value), torch.zeros_like(value)
    for b, start, stop, number in stretches(document):
        running = 0.0
        for t in reversed(range(start, stop)):
            reward = float(rewards[number]) if t == stop - 1 else 0.0
            after = 0.0 if t == stop - 1 else float(value[b, t])
            before = float(value[b, t - 1]) if t > start else 0.0
            td[b, t] = reward + gamma * after - before
            running = float(td[b, t]) + gamma * lam * running
            gae[b, t] = running
    return gae, td


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.97, 0.0), (1.0, 0.0)])
def test_returns_and_advantages_equal_loops(seed, gamma, lam):
    document, value, rewards = ragged(seed)
    reward = by_token(rewards, document)
    returns = lambda_returns(value, reward, document, gamma=gamma, lam=lam)
    same(returns, loop_lambda_returns(document, value, rewards, gamma, lam), document)
    gae, td = loop_advantages(document, value, rewards, gamma, lam)
    same(advantages(value, reward, document, gamma=gamma, lam=lam), gae, document)
    same(advantages(value, reward, document, gamma=gamma, lam=lam, delta="td"), td, document)
    plain = loop_lambda_returns(document, value, rewards, gamma, 1.0)
    same(monte_carlo_returns(reward, document, gamma=gamma), plain, document)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 31, 64, 65, 1000])
def test_sums_of_one_long_document(length):
    values = torch.randn(1, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    document = torch.zeros(1, length, dtype=torch.int64)
    expected, running = torch.zeros_like(values), 0.0
    for t in reversed(range(length)):
        running = float(values[0, t]) + 0.95 * running
        expected[0, t] = running
    same(discounted_sums(values, 0.95, document), expected, document)


@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_of_one_is_the_limit_and_the_reward_less_the_value_before(seed):
    document, value, rewards = ragged(seed)
    reward = by_token(rewards, document)
    limit = advantages(value, reward, document, gamma=1.0, lam=1.0)
    near = advantages(value, reward, document, gamma=1.0, lam=1.0 - 1e-9)
    assert (limit - near).abs().max() < 1e-6
    for b, start, stop, number in stretches(document):
        for t in range(start + 1, stop):
            assert float(limit[b, t]) == pytest.approx(float(rewards[number] - value[b, t - 1]), abs=1e-9)


def test_what_padding_and_other_documents_hold_is_of_no_account():
    document, value, rewards = ragged(1)
    reward = by_token(rewards, document)
    chosen = stretches(document)[2]
    b, start, stop, _ = chosen
    own = torch.zeros_like(document, dtype=torch.bool)
    own[b, start:stop] = True
    poisoned = torch.where(own, value, torch.nan)
    for function in (advantages, lambda_returns):
        clean = function(value, reward, document, gamma=0.9, lam=0.8)
        dirty = function(poisoned, reward, document, gamma=0.9, lam=0.8)
        assert torch.equal(clean[own], dirty[own])


def test_single_precision_stays_close():
    document, value, rewards = ragged(3)
    exact = advantages(value, by_token(rewards, document), document, gamma=1.0, lam=0.95)
    single = advantages(value.float(), by_token(rewards.float(), document), document, gamma=1.0, lam=0.95)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_moments_means_and_correlation_equal_loops(seed):
    document, value, rewards = ragged(seed)
    mask = (document != PADDING) & (value > -1)
    chosen = [float(v) for v, m in zip(value.flatten(), mask.flatten(), strict=True) if m]
    mean = sum(chosen) / len(chosen)
    variance = sum((v - mean) ** 2 for v in chosen) / len(chosen)
    assert [float(x) for x in masked_moments(value, mask)] == pytest.approx([len(chosen), mean, variance], abs=1e-12)

    means = document_means(value, mask, document, len(rewards))
    for number in range(len(rewards)):
        own = [float(v) for v in value[mask & (document == number)]]
        assert float(means[number]) == pytest.approx(sum(own) / len(own) if own else 0.0, abs=1e-12)

    other = value.roll(1, 1) + 0.5 * value
    others = [float(v) for v, m in zip(other.flatten(), mask.flatten(), strict=True) if m]
    mean2 = sum(others) / len(others)
    top = sum((a - mean) * (b - mean2) for a, b in zip(chosen, others, strict=True))
    bottom = math.sqrt(sum((a - mean) ** 2 for a in chosen) * sum((b - mean2) ** 2 for b in others))
    assert float(correlation(value, other, mask)) == pytest.approx(top / bottom, abs=1e-9)
    assert torch.isnan(correlation(value, torch.ones_like(value), mask))


def test_moments_of_nothing():
    assert [float(x) for x in masked_moments(torch.full((2, 2), torch.nan), torch.zeros(2, 2, dtype=torch.bool))] == [0, 0, 0]


def test_weights_equal_the_formula():
    advantage = torch.tensor([-5.0, -0.5, 0.0, 0.25, 1.0, 90.0])
    options = {"mean": torch.tensor(0.25), "std": torch.tensor(0.5), "beta": 2.0, "min_weight": 0.1, "max_weight": 3.0}
    expected = [min(3.0, max(0.1, math.exp(min(700.0, (a - 0.25) / 0.5 / 2.0)))) for a in advantage.tolist()]
    assert advantage_weights(advantage, **options).tolist() == pytest.approx(expected)


def test_advantages_that_are_all_the_same_give_weights_of_one():
    advantage = torch.full((4,), 0.7)
    zero = torch.tensor(0.0)
    weights = advantage_weights(advantage, mean=torch.tensor(0.7), std=zero, beta=1.0, min_weight=0.1, max_weight=3.0)
    assert weights.tolist() == [1.0] * 4
